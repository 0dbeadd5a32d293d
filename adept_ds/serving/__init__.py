"""Adapters on a stock vLLM server: checking them, vLLM's command line, and what vLLM cannot know (`vllm_plugin`)."""
