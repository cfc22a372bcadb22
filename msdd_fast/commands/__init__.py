"""One module per subcommand, with ``add_arguments(parser)`` and ``run(args)``; ``main`` has the table of them."""
