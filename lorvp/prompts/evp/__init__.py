"""EVP's prompt, an added frame around the shrunken image."""
