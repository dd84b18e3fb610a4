"""The Llama: its sizes (config), the network (llama, attention, linear) and the mixture layer
(routers, balance, moe, dispatch, permute, grouped). Parameters are plain nested dicts of arrays,
with layers stacked on a leading axis."""
