"""Devices: where files are run. ``on_NAME.py`` reaches devices whose address begins with NAME.

A device needs nothing of deploykit's: a POSIX shell to begin with, and per kind of artifact a runtime, which
`deploykit.devices.kinds` names where it is missing. What is written there lies in one folder and may be deleted at any
time.
"""

from deploykit.devices.address import Address, parse
from deploykit.devices.device import Device, Lost, Ran, connect
from deploykit.devices.facts import read_facts

__all__ = ["Address", "Device", "Lost", "Ran", "connect", "parse", "read_facts"]
