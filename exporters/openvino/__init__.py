"""What the OpenVINO exporter is made of; `deploykit.exporters.to_openvino` is the exporter itself."""
