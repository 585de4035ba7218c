"""What makes prompts harder: each method turns a PromptSet into a harder one, paired with the first by `group`."""
