"""Other libraries' names and signatures over the operations here: one module a library, switched to by one import."""
