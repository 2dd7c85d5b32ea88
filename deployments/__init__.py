"""The online deployment on Ray Serve. Empty for now: the engine that it will hold is `pipeline.engine.VLLMEngine`."""
