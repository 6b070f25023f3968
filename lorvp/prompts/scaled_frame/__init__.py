"""AutoVP's prompt, a frame around an image of learned scale."""
