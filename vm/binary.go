package vm

import (
	"debug/elf"
	"fmt"
)

// checkStatic refuses a program that cannot be the init of a guest because it
// needs a dynamic linker, which guests do not have.
func checkStatic(path string) error {
	f, err := elf.Open(path)
	if err != nil {
		return fmt.Errorf("read program for guests: %w", err)
	}
	defer f.Close()
	for _, p := range f.Progs {
		if p.Type == elf.PT_INTERP {
			return &MissingError{
				What: path + " is not a static program, so it cannot start in a guest",
				Hint: "build nbd with CGO_ENABLED=0",
			}
		}
	}
	return nil
}
