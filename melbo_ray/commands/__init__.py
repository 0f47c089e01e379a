"""The commands of `melbo-ray`, a module each: `main(args)` with the arguments after the command's name."""
