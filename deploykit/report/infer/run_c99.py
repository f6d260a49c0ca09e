"""How the C of `deploykit.exporters.to_c99` is run: in firmware; here, its self-test."""

COMMANDS = ("make test",)
ABOUT = (
    "That compiles the network on this machine and compares the golden vectors byte by byte. "
    "`FIRMWARE.md` says how it goes on the device."
)
INTEGERS_ONLY = True
"""Nothing may stay in float."""
TIMING = ""
"""Times on this machine say nothing about a microcontroller."""
