from par_diffusers.cli import main


main()
