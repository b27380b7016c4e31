"""What pyproject.toml cannot say: ``configs/``, which stands beside the package in a checkout, goes into the wheel.

There it is ``lightning_tta/configs``, from where ``lightning-tta init`` copies it. An editable installation reads the
checkout's own.
"""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithConfigs(build_py):
    """Builds the package and puts the configurations into it."""

    def run(self) -> None:
        """Copy the modules, then the configurations."""
        super().run()
        if not self.editable_mode:
            shutil.copytree("configs", Path(self.build_lib, "lightning_tta", "configs"), dirs_exist_ok=True)


setup(cmdclass={"build_py": BuildWithConfigs})
