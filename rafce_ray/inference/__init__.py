"""What runs a bundle's network: torch, OpenVINO or ONNX Runtime behind one interface, and the export of its graph."""
