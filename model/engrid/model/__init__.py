"""The mathematics of an Engram language model in torch: the Engram layer, attention, MoE, generation. Knows no service."""
