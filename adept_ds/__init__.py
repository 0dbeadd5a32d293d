"""ADePT fine-tuning of billion-scale language models under DeepSpeed."""
