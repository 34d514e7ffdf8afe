// Command reader is the init of a guest that reads a tree of files and tells the
// host, on its console, when it begins and ends. The kernel's command line has
// reader=FSTYPE,SOURCE,OPTIONS, with colons for the commas of the options.
package main

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

func main() {
	if err := run(); err != nil {
		fmt.Println("reader:", err)
	}
	if err := unix.Reboot(unix.LINUX_REBOOT_CMD_RESTART); err != nil {
		fmt.Println("reader: reset:", err)
	}
	select {}
}

func run() error {
	for target, fstype := range map[string]string{"/dev": "devtmpfs", "/proc": "proc"} {
		if err := unix.Mount("none", target, fstype, 0, ""); err != nil && !errors.Is(err, unix.EBUSY) {
			return err
		}
	}
	if console, err := unix.Open("/dev/console", unix.O_WRONLY|unix.O_NOCTTY, 0); err == nil {
		if err := unix.Dup3(console, 1, 0); err != nil {
			return err
		}
	}
	if err := loadModules(); err != nil {
		return err
	}
	line, err := os.ReadFile("/proc/cmdline")
	if err != nil {
		return err
	}
	_, what, _ := strings.Cut(string(line), "reader=")
	what, _, _ = strings.Cut(strings.TrimSpace(what), " ")
	if err := mount(strings.SplitN(what, ",", 3)); err != nil {
		return err
	}
	fmt.Println("reader: walk")
	files, err := walk()
	if err != nil {
		return err
	}
	fmt.Println("reader: read")
	bytes, err := read(files)
	if err != nil {
		return err
	}
	fmt.Println("reader: end", len(files), bytes)
	return nil
}

func loadModules() error {
	files, err := filepath.Glob("/modules/*.ko")
	if err != nil {
		return err
	}
	for _, path := range files {
		f, err := os.Open(path)
		if err != nil {
			return err
		}
		err = unix.FinitModule(int(f.Fd()), "", 0)
		f.Close() // only read
		if err != nil && !errors.Is(err, unix.EEXIST) {
			return fmt.Errorf("%s: %w", path, err)
		}
	}
	return nil
}

// mount mounts what the host wants; a device may take a moment to show.
func mount(how []string) error {
	if len(how) != 3 {
		return fmt.Errorf("bad command line %q", how)
	}
	if err := os.Mkdir("/files", 0o755); err != nil {
		return err
	}
	for start := time.Now(); ; time.Sleep(10 * time.Millisecond) {
		err := unix.Mount(how[1], "/files", how[0], unix.MS_RDONLY, strings.ReplaceAll(how[2], ":", ","))
		if err == nil || time.Since(start) > 20*time.Second {
			return err
		}
	}
}

func walk() (files []string, err error) {
	err = filepath.WalkDir("/files", func(path string, e fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := e.Info() // stat
		if err == nil && info.Mode().IsRegular() {
			files = append(files, path)
		}
		return err
	})
	return files, err
}

func read(files []string) (sum int64, err error) {
	buf := make([]byte, 128<<10)
	for _, path := range files {
		f, err := os.Open(path)
		if err != nil {
			return 0, err
		}
		n, err := io.CopyBuffer(struct{ io.Writer }{io.Discard}, struct{ io.Reader }{f}, buf)
		if err := errors.Join(err, f.Close()); err != nil {
			return 0, err
		}
		sum += n
	}
	return sum, nil
}
