"""Work that is done once: jobs, named by what decides their result, and the processes that run them."""
