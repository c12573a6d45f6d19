"""`python -m genrecal`, the same as `genrecal`: what launchers such as torchrun start."""

from genrecal.cli import main

if __name__ == "__main__":
    main()
