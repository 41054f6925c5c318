"""Optional accelerators: OpenVINO for the image tower on a CPU, faiss for galleries of millions of places."""
