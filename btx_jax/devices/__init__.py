"""The devices: the mesh, where arrays live on it, what the hardware can do, several processes."""
