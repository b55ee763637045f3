"""What pyproject.toml cannot say: a built package carries a copy of `results/`.

The chapters draw recorded results. In a clone these lie beside the package; on Colab, where only
the package is installed, `qlora_lab.recorded.results` reads this copy.
"""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class WithResults(build_py):
    def run(self):
        super().run()
        if not self.editable_mode:
            assets = Path(self.build_lib) / "qlora_lab" / "assets"
            shutil.copytree("results", assets / "results", dirs_exist_ok=True)


setup(cmdclass={"build_py": WithResults})
