"""The Llama: its sizes (config), the network (llama, attention) and the mixture layer
(routing, moe). Parameters are plain nested dicts of arrays, layers stacked on a leading axis."""
