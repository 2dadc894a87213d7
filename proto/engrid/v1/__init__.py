"""The wire contract: generated from the .proto files beside this; see `make stubs`. Never edited."""
