"""Package metadata, all of it read from settings.ini."""

from configparser import ConfigParser
from pathlib import Path

from setuptools import find_namespace_packages, setup

config = ConfigParser(delimiters=["="])
config.read(Path(__file__).with_name("settings.ini"), encoding="utf-8")
settings = config["DEFAULT"]
extras = [name for name in settings if name.endswith("_requirements")]

setup(
    version=settings["version"],
    description=settings["description"],
    keywords=settings["keywords"].split(),
    author=settings["author"],
    python_requires=">=" + settings["min_python"],
    packages=find_namespace_packages(include=["sliderspace", "sliderspace.*"]),
    package_data={"sliderspace": settings["package_data"].split()},
    install_requires=settings["requirements"].split(),
    extras_require={name.removesuffix("_requirements"): settings[name].split() for name in extras},
    entry_points={"console_scripts": settings["console_scripts"].split()},
)
