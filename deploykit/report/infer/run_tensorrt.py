"""How the bundle of `deploykit.exporters.to_tensorrt` is run: not here, the device builds its own engine first."""

COMMANDS = ("./build.sh",)
ABOUT = (
    "The engine is built on the device, from a copy of this folder, with nothing but Python and TensorRT's `trtexec`. "
    "`BUILD.md` says what the script does."
)
