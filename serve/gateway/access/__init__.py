"""Who may use the server: keys, what each may do, and how a request shows one."""
