"""Files of a model in other formats: GGUF for llama.cpp, and quantised safetensors for vLLM."""
