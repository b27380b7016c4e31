"""Monitors: small observers of a stream that raise alarms, estimate accuracy, or give numbers. One interface."""
