"""What the suite promises on a GPU, checked on one: ``make gpu`` (`docs/scaling.md`, "On a real GPU").

Every check compares the GPU with the CPU, with another formulation, or with itself after a kill. `suite` lists them,
`launch` runs them in processes side by side (what is timed, alone), `worker` is such a process.
"""
