"""The model families: one decoder, and a file per family that turns its config.json into a DecoderSpec."""
