package vm

import (
	"debug/elf"
	"errors"
	"fmt"
	"io"
)

// checkStatic refuses a program that cannot be the init of a guest because it
// needs a dynamic linker, which guests do not have.
func checkStatic(path string) error {
	static, err := isStatic(path)
	if err != nil {
		return fmt.Errorf("read program for guests: %w", err)
	}
	if !static {
		return &MissingError{
			What: path + " is not a static program, so it cannot start in a guest",
			Hint: "build nbd with CGO_ENABLED=0",
		}
	}
	return nil
}

// isStatic reports whether a program needs no dynamic linker.
func isStatic(path string) (bool, error) {
	f, err := elf.Open(path)
	if err != nil {
		return false, fmt.Errorf("%s: %w", path, err)
	}
	defer f.Close()
	for _, p := range f.Progs {
		if p.Type == elf.PT_INTERP {
			return false, nil
		}
	}
	return true, nil
}

// loadedSize returns how many bytes of a file of size bytes are needed to run
// it. What debuggers read lies behind those, and neither the kernel nor Go's
// runtime looks at it. It is the whole size if the file is no ELF file.
func loadedSize(f io.ReaderAt, size int64) (int64, error) {
	program, err := elf.NewFile(f)
	var format *elf.FormatError
	if errors.As(err, &format) || errors.Is(err, io.EOF) {
		return size, nil
	} else if err != nil {
		return 0, err
	}
	var end uint64
	for _, p := range program.Progs {
		if p.Filesz > uint64(size) || p.Off > uint64(size)-p.Filesz {
			return 0, errors.New("its end is missing")
		}
		end = max(end, p.Off+p.Filesz)
	}
	if end == 0 {
		return size, nil
	}
	return int64(end), nil
}
