"""Reinforcement learning: GRPO with verifiable rewards, rollouts by vLLM."""
