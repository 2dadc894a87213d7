"""The mathematics of an Engram language model: hashing, the Engram layer, attention, MoE. Knows no service."""
