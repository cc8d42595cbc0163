"""The suite that holds two implementations of GPT-2 against each other: adapters, checks, and planted mistakes."""
