package vm

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io"
	"os"
	"path/filepath"
	"slices"

	"nbd/vm/link"
)

// A cpioWriter writes the archive that Linux unpacks into its first root file
// system: "newc" (Documentation/driver-api/early-userspace/buffer-format.rst in
// the kernel's sources). It is not compressed: under emulation unpacking costs
// more than copying.
type cpioWriter struct {
	w     io.Writer
	inode int
	size  int64
	err   error
}

// Modes of archive members.
const (
	cpioDirectory  = 0o040755
	cpioFile       = 0o100444
	cpioExecutable = 0o100555
)

// member writes a header and the name; the caller writes size bytes of contents
// and then calls pad.
func (c *cpioWriter) member(name string, mode int, size int64) {
	if size > 1<<32-1 && c.err == nil {
		c.err = fmt.Errorf("%s: too large for the initramfs", name)
	}
	links := 1
	if mode == cpioDirectory {
		links = 2
	}
	c.inode++
	fmt.Fprintf(c, "070701%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%s\x00",
		c.inode, mode, 0, 0, links, 1, size, 0, 0, 0, 0, len(name)+1, 0, name)
	c.pad()
}

// Write implements io.Writer, with the error kept.
func (c *cpioWriter) Write(p []byte) (int, error) {
	if c.err != nil {
		return 0, c.err
	}
	n, err := c.w.Write(p)
	c.size += int64(n)
	c.err = err
	return n, err
}

// pad fills up to a multiple of four bytes.
func (c *cpioWriter) pad() { c.Write(make([]byte, -c.size&3)) }

// bytes writes a whole member.
func (c *cpioWriter) bytes(name string, mode int, data []byte) {
	c.member(name, mode, int64(len(data)))
	c.Write(data)
	c.pad()
}

// file writes a member from a file of the host: all of it, or of a program what
// is loaded, since each byte is held twice by every guest.
func (c *cpioWriter) file(name string, mode int, path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return err
	}
	if !info.Mode().IsRegular() {
		return fmt.Errorf("%s is not a regular file", path)
	}
	size, err := loadedSize(f, info.Size())
	if err != nil {
		return fmt.Errorf("read %s: %w", path, err)
	}
	c.member(name, mode, size)
	if _, err := io.CopyN(c, f, size); err != nil {
		return fmt.Errorf("read %s: %w", path, err)
	}
	c.pad()
	return c.err
}

// writeInitrd writes the initramfs: the program that is the guest's init, the
// shell of the sandbox, and the modules in their order. A guest that is to run
// guests has modules for that, too, or a folder for none; others have nil.
func writeInitrd(w io.Writer, init, shell string, modules, kvm []module) error {
	c := &cpioWriter{w: w}
	if err := c.file(rooted(link.InitPath), cpioExecutable, init); err != nil {
		return err
	}
	if shell != "" {
		if err := c.file(rooted(link.ShellPath), cpioExecutable, shell); err != nil {
			return err
		}
	}
	for _, dir := range []string{link.ModuleDir, "/dev", "/proc", "/sys"} {
		c.bytes(rooted(dir), cpioDirectory, nil)
	}
	c.modules(link.ModuleDir, modules)
	if kvm != nil {
		c.bytes(rooted(link.KVMModuleDir), cpioDirectory, nil)
		c.modules(link.KVMModuleDir, kvm)
	}
	c.bytes("TRAILER!!!", 0, nil)
	return c.err
}

// modules writes modules into a folder, under names that sort in their order.
func (c *cpioWriter) modules(dir string, modules []module) {
	for i, m := range modules {
		c.bytes(fmt.Sprintf("%s/%03d-%s.ko", rooted(dir), i, m.name), cpioFile, m.data)
	}
}

// rooted returns an absolute path as the archive names it.
func rooted(path string) string { return path[1:] }

// bootFiles are the kernel and the initramfs that guests boot. They lie in
// files without names, so that nothing changes under a running guest and
// nothing needs to be removed.
type bootFiles struct {
	kernel, initrd *os.File
	kernelHash     string // of the contents, hex
	initrdHash     string
	// nested is the initramfs of guests that run guests; nil if there are none.
	nested     *os.File
	nestedHash string
}

// initrdFor returns the initramfs of a machine and its hash.
func (b *bootFiles) initrdFor(m machine) (*os.File, string) {
	if m.kvm {
		return b.nested, b.nestedHash
	}
	return b.initrd, b.initrdHash
}

// makeBootFiles reads the kernel and makes the initramfs.
func makeBootFiles(dir string, k Kernel, init, shell string) (_ *bootFiles, err error) {
	if err := checkStatic(init); err != nil {
		return nil, err
	}
	modules, err := loadModules(k.Modules, guestModules)
	if err != nil {
		return nil, err
	}
	b := new(bootFiles)
	defer func() {
		if err != nil {
			err = errors.Join(err, b.close())
		}
	}()
	b.kernel, b.kernelHash, err = namelessFile(dir, func(w io.Writer) error {
		f, err := os.Open(k.Image)
		if err != nil {
			return err
		}
		defer f.Close()
		image, err := plainImage(f)
		if err != nil {
			return err
		}
		_, err = io.Copy(w, image)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("read kernel: %w", err)
	}
	b.initrd, b.initrdHash, err = namelessFile(dir, func(w io.Writer) error {
		return writeInitrd(w, init, shell, modules, nil)
	})
	if err != nil {
		return nil, fmt.Errorf("make initramfs: %w", err)
	}
	return b, nil
}

// close closes the files. Guests that run keep what they opened.
func (b *bootFiles) close() error {
	var errs []error
	for _, f := range []*os.File{b.kernel, b.initrd, b.nested} {
		if f != nil {
			errs = append(errs, f.Close())
		}
	}
	return errors.Join(errs...)
}

// namelessFile returns a file in dir without a name that holds what fill
// writes, readable by everybody who has its descriptor, and the hash of its
// contents.
func namelessFile(dir string, fill func(io.Writer) error) (_ *os.File, sum string, err error) {
	f, err := os.CreateTemp(dir, bootPrefix)
	if err != nil {
		return nil, "", err
	}
	defer func() {
		if err != nil {
			f.Close()
		}
	}()
	if err := os.Remove(f.Name()); err != nil {
		return nil, "", err
	}
	h := sha256.New()
	if err := fill(io.MultiWriter(f, h)); err != nil {
		return nil, "", err
	}
	if err := f.Chmod(0o444); err != nil {
		return nil, "", err
	}
	// All guests get this file: none shall be able to write to it, not even one
	// that has taken over its QEMU.
	readable, err := reopen(f)
	if err != nil {
		return nil, "", err
	}
	return readable, sumHex(h), f.Close()
}

func sumHex(h hash.Hash) string { return hex.EncodeToString(h.Sum(nil)) }

// hashFile returns the SHA-256 of a file's contents in hex.
func hashFile(path string) (string, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		return "", fmt.Errorf("read %s: %w", path, err)
	}
	return sumHex(h), nil
}

// shellPlaces is where distributions keep a static busybox: Debian's
// busybox-static, Fedora's busybox, NixOS's sandbox shell by its profile.
var shellPlaces = []string{
	"/bin/busybox", "/usr/bin/busybox", "/sbin/busybox", "/usr/sbin/busybox",
	"/usr/lib/initcpio/busybox", "/run/current-system/sw/bin/busybox",
}

// Imported shells lie in the state directory, each in a folder of its
// architecture.
const (
	shellsDir     = "shells"
	importedShell = "busybox"
)

// shellPath is where the imported shell for an architecture lies, if there is one.
func shellPath(stateDir string, a *arch) string {
	return filepath.Join(stateDir, shellsDir, a.name, importedShell)
}

// findShell returns the static shell for the sandbox of guests of an
// architecture. What is configured, and what the host has, is for the host's.
func findShell(stateDir, configured string, a *arch) (string, error) {
	imported := shellPath(stateDir, a)
	if a.name != hostArchName() {
		if _, err := os.Stat(imported); err == nil {
			return imported, nil
		}
		return "", &MissingError{What: "no static busybox for " + a.name + " was found, which builds see as /bin/sh",
			Hint: fmt.Sprintf("take a distribution's package of one, such as Debian's busybox-static_…_%s.deb, and nbd kernel import FILE", a.goarch)}
	}
	places := append([]string{imported}, shellPlaces...)
	if configured != "" {
		places = []string{configured}
	}
	var dynamic []string
	for _, p := range places {
		path, err := filepath.EvalSymlinks(p)
		if err != nil || slices.Contains(dynamic, path) {
			continue
		}
		static, err := isStatic(path)
		if err != nil {
			return "", fmt.Errorf("read shell of the sandbox: %w", err)
		}
		if static {
			return path, nil
		}
		dynamic = append(dynamic, path)
	}
	what := "no static busybox was found, which builds see as /bin/sh"
	if configured != "" {
		what = "there is no busybox " + configured + ", which builds see as /bin/sh"
	}
	if len(dynamic) > 0 {
		what = dynamic[0] + " is not statically linked and cannot be the /bin/sh of builds"
	}
	return "", &MissingError{What: what, Hint: "Debian: apt install busybox-static; or name one with --sandbox-shell"}
}

// bootPrefix starts the names of boot files, which have one for a moment.
const bootPrefix = "boot-"
