"""Many runs from one configuration file."""
