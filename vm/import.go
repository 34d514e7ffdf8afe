package vm

import (
	"archive/tar"
	"bufio"
	"debug/elf"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
)

// maxKernelFiles bounds the bytes that one import takes out of packages: a
// distribution's full kernel has less than half a gibibyte.
const maxKernelFiles = 4 << 30

// An Imported tells what an import brought.
type Imported struct {
	// Kernel has no name if there was none.
	Kernel Kernel
	// Shell is the architecture of the busybox that builds see as /bin/sh; ""
	// if there was none.
	Shell string
}

// String tells it in words.
func (i Imported) String() string {
	var parts []string
	if i.Kernel.Name != "" {
		parts = append(parts, i.Kernel.Name)
	}
	if i.Shell != "" {
		parts = append(parts, "busybox for "+i.Shell)
	}
	return strings.Join(parts, " and ")
}

// Import takes what guests need out of a distribution's package (.deb, .rpm), or
// of a folder that holds packages or what was in them: a kernel image with its
// modules, anywhere in it, a static busybox, or both. It keeps them in stateDir;
// of each there is one under a name, the last.
func Import(stateDir, from string) (_ Imported, err error) {
	dir := filepath.Join(stateDir, kernelsDir)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return Imported{}, fmt.Errorf("import: %w", err)
	}
	temp, err := os.MkdirTemp(dir, ".import-*")
	if err != nil {
		return Imported{}, fmt.Errorf("import: %w", err)
	}
	defer func() { err = errors.Join(err, os.RemoveAll(temp)) }()
	im := &importer{dir: temp, left: maxKernelFiles}
	if err := im.take(from); err != nil {
		return Imported{}, fmt.Errorf("import from %s: %w", from, err)
	}
	if im.image == nil && im.modules == 0 && im.shell {
		shell, err := im.keepShell(stateDir)
		return Imported{Shell: shell}, err
	}
	name, err := im.finish()
	if err != nil {
		return Imported{}, fmt.Errorf("import from %s: %w", from, err)
	}
	var got Imported
	if im.shell {
		if got.Shell, err = im.keepShell(stateDir); err != nil {
			return Imported{}, err
		}
	}
	if err := replaceDir(temp, filepath.Join(dir, name)); err != nil {
		return Imported{}, fmt.Errorf("import: %w", err)
	}
	got.Kernel = importedKernel(dir, name)
	return got, nil
}

// replaceDir puts the folder temp in the place of at, which may exist.
func replaceDir(temp, at string) error {
	old := temp + ".old"
	if err := os.Rename(at, old); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	if err := os.Rename(temp, at); err != nil {
		return err
	}
	return os.RemoveAll(old)
}

// An importer collects the files of one kernel in a folder.
type importer struct {
	dir     string
	left    int64  // bytes that may still be taken
	image   *arch  // nil before there is one
	release string // as the image tells it, "" if it does not
	modules int
	shell   bool // a busybox was taken
}

// take takes what is in a package, an image or a folder.
func (im *importer) take(from string) error {
	info, err := os.Stat(from)
	if err != nil {
		return err
	}
	if info.IsDir() {
		return im.takeFolder(from)
	}
	return im.takeFile(from)
}

// takeFolder takes all files below from, through links.
func (im *importer) takeFolder(from string) error {
	const maxFiles = 1_000_000 // more is a loop of links
	todo := []string{from}
	for n := 0; len(todo) > 0; n++ {
		if n == maxFiles {
			return errors.New("too many files")
		}
		at := todo[len(todo)-1]
		todo = todo[:len(todo)-1]
		info, err := os.Stat(at)
		if errors.Is(err, os.ErrNotExist) {
			continue // a dangling link, such as "build"
		} else if err != nil {
			return err
		}
		if info.IsDir() {
			for _, e := range readNames(at) {
				todo = append(todo, filepath.Join(at, e))
			}
		} else if err := im.takeFile(at); err != nil {
			return fmt.Errorf("%s: %w", at, err)
		}
	}
	return nil
}

// readNames returns the names in a folder that may hold parts of a kernel.
func readNames(dir string) []string {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil
	}
	var names []string
	for _, e := range entries {
		if e.Name() != "build" && e.Name() != "source" {
			names = append(names, e.Name())
		}
	}
	return names
}

// takeFile takes one file of the host, which may be a package.
func (im *importer) takeFile(file string) error {
	f, err := os.Open(file)
	if err != nil {
		return err
	}
	defer f.Close()
	switch {
	case strings.HasSuffix(file, ".deb"):
		return readDeb(f, im.member)
	case strings.HasSuffix(file, ".rpm"):
		return readRPM(f, im.member)
	}
	return im.member(file, f)
}

// member takes one file by its name if it is part of a kernel. Modules lose
// their folders, so that no name from a package leads anywhere.
func (im *importer) member(name string, r io.Reader) error {
	base := path.Base(name)
	if _, ok := moduleName(base); ok {
		im.modules++
		return im.write(filepath.Join(importedFiles, base), r)
	}
	if base == importedShell {
		return im.takeShell(r)
	}
	if !strings.HasPrefix(base, "vmlinuz") && base != "bzImage" && base != "Image" && base != "kernel" {
		return nil
	}
	return im.takeImage(name, r)
}

// takeShell takes a busybox, and leaves what else has its name, such as what a
// package tells of it.
func (im *importer) takeShell(r io.Reader) error {
	b := bufio.NewReader(r)
	if magic, err := b.Peek(len(elf.ELFMAG)); err == io.EOF || err == nil && string(magic) != elf.ELFMAG {
		return nil
	} else if err != nil {
		return err
	}
	im.shell = true
	return im.write(importedShell, b)
}

// takeImage takes a kernel image.
func (im *importer) takeImage(name string, r io.Reader) error {
	b, err := plainImage(r)
	if err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	head, err := b.Peek(imageHead)
	if err != nil && err != io.EOF {
		return fmt.Errorf("%s: %w", name, err)
	}
	a, release, err := identifyImage(head)
	if err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	if im.image != nil && (im.image != a || im.release != release) {
		return fmt.Errorf("there are several kernels: %s is not the only one", name)
	}
	im.image, im.release = a, release
	return im.write(importedImage, b)
}

// write keeps a file.
func (im *importer) write(name string, r io.Reader) error {
	at := filepath.Join(im.dir, name)
	if err := os.MkdirAll(filepath.Dir(at), 0o755); err != nil {
		return err
	}
	f, err := os.OpenFile(at, os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	n, err := io.Copy(f, io.LimitReader(r, im.left+1))
	im.left -= n
	if im.left < 0 {
		err = errors.New("the files of the kernel are too large")
	}
	if err := errors.Join(err, f.Close()); err != nil {
		return fmt.Errorf("%s: %w", path.Base(name), err)
	}
	return nil
}

// finish checks that everything of a kernel is there and returns its name: the
// release, and the architecture if that does not tell it and is not x86-64.
func (im *importer) finish() (string, error) {
	if im.image == nil {
		return "", errors.New("there is no kernel image (vmlinuz) in it")
	}
	if im.modules == 0 {
		return "", errors.New("there are no kernel modules (.ko) in it; packages that are split go into one folder: nbd kernel import DIR")
	}
	modules := filepath.Join(im.dir, importedFiles)
	if _, err := loadModules(modules, guestModules); err != nil {
		return "", err
	}
	release, err := im.checkModules(modules)
	if err != nil {
		return "", err
	}
	if im.image != archX8664 && !im.image.named(release) {
		release += "-" + im.image.name
	}
	return release, os.Chmod(im.dir, 0o755)
}

// checkModules sees by one module that they are for the image, and returns the
// release of both.
func (im *importer) checkModules(dir string) (string, error) {
	files, err := moduleFiles(dir)
	if err != nil {
		return "", err
	}
	name := slices.Min(slices.Collect(maps.Keys(files)))
	data, err := readModule(files[name])
	if err != nil {
		return "", fmt.Errorf("kernel module %s: %w", name, err)
	}
	release, machine, err := moduleRelease(data)
	if err != nil {
		return "", fmt.Errorf("kernel module %s: %w", name, err)
	}
	switch {
	case machine != im.image.elf:
		return "", fmt.Errorf("the kernel is for %s, and its modules are for another machine (%v)", im.image.name, machine)
	case im.release == "":
		return release, checkKernelName(release)
	case release != "" && release != im.release:
		return "", fmt.Errorf("the kernel is %s, and its modules are for %.80q", im.release, release)
	}
	return im.release, nil
}

// keepShell moves the busybox to its place and returns its architecture.
func (im *importer) keepShell(stateDir string) (string, error) {
	from := filepath.Join(im.dir, importedShell)
	a, err := archOfProgram(from)
	if err != nil {
		return "", fmt.Errorf("import busybox: %w", err)
	}
	to := shellPath(stateDir, a)
	if err := os.MkdirAll(filepath.Dir(to), 0o755); err != nil {
		return "", fmt.Errorf("import busybox: %w", err)
	}
	if err := errors.Join(os.Chmod(from, 0o755), os.Rename(from, to)); err != nil {
		return "", fmt.Errorf("import busybox: %w", err)
	}
	return a.name, nil
}

// archOfProgram returns for which architecture a static program is.
func archOfProgram(path string) (*arch, error) {
	static, err := isStatic(path)
	if err != nil {
		return nil, err
	}
	if !static {
		return nil, errors.New("it is not statically linked (Debian: the package busybox-static)")
	}
	f, err := elf.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	a := archOfELF(f.Machine)
	if a == nil {
		return nil, fmt.Errorf("it is for a machine (%v) of which there are no guests", f.Machine)
	}
	return a, nil
}

// readDeb calls take for each regular file of a Debian package: an ar archive
// (deb(5)) with a member data.tar, compressed as its name says.
func readDeb(r io.Reader, take func(name string, r io.Reader) error) error {
	b := bufio.NewReader(r)
	var magic [8]byte
	if _, err := io.ReadFull(b, magic[:]); err != nil || string(magic[:]) != "!<arch>\n" {
		return errors.New("not a Debian package")
	}
	for {
		var head [60]byte
		if _, err := io.ReadFull(b, head[:]); err == io.EOF {
			return errors.New("the Debian package has no data.tar")
		} else if err != nil {
			return fmt.Errorf("read package: %w", err)
		}
		size, err := strconv.ParseInt(strings.TrimSpace(string(head[48:58])), 10, 64)
		if err != nil || size < 0 || head[58] != '`' || head[59] != '\n' {
			return errors.New("read package: bad member header")
		}
		name := strings.TrimRight(strings.TrimSpace(string(head[:16])), "/")
		if ext, ok := strings.CutPrefix(name, "data.tar"); ok {
			u, err := decompressor(io.LimitReader(b, size), ext)
			if err != nil {
				return fmt.Errorf("read package: %s: %w", name, err)
			}
			return readTar(u, take)
		}
		if _, err := io.CopyN(io.Discard, b, size+size&1); err != nil {
			return fmt.Errorf("read package: %w", err)
		}
	}
}

// readTar calls take for each regular file.
func readTar(r io.Reader, take func(name string, r io.Reader) error) error {
	t := tar.NewReader(r)
	for {
		h, err := t.Next()
		if err == io.EOF {
			return nil
		} else if err != nil {
			return fmt.Errorf("read package: %w", err)
		}
		if h.FileInfo().Mode().IsRegular() {
			if err := take(h.Name, t); err != nil {
				return err
			}
		}
	}
}

// readRPM calls take for each regular file of an RPM package: a lead, two
// headers and a compressed cpio archive (https://rpm-software-management.github.io/rpm/manual/format_v4.html).
func readRPM(r io.Reader, take func(name string, r io.Reader) error) error {
	b := bufio.NewReader(r)
	lead := make([]byte, 96)
	if _, err := io.ReadFull(b, lead); err != nil || binary.BigEndian.Uint32(lead) != 0xedabeedb {
		return errors.New("not an RPM package")
	}
	for _, align := range []int64{8, 1} { // signature, header
		if err := skipRPMHeader(b, align); err != nil {
			return fmt.Errorf("read package: %w", err)
		}
	}
	magic, err := b.Peek(6)
	if err != nil {
		return fmt.Errorf("read package: %w", err)
	}
	u, err := decompressor(b, compressionOf(magic))
	if err != nil {
		return fmt.Errorf("read package: %w", err)
	}
	return readCpio(u, take)
}

// compressionOf returns the usual extension for data that starts so.
func compressionOf(magic []byte) string {
	switch {
	case strings.HasPrefix(string(magic), "\xfd7zXZ\x00"):
		return ".xz"
	case strings.HasPrefix(string(magic), "\x28\xb5\x2f\xfd"):
		return ".zst"
	case strings.HasPrefix(string(magic), "\x1f\x8b"):
		return ".gz"
	}
	return ""
}

// skipRPMHeader skips one header structure, whose end is aligned.
func skipRPMHeader(r io.Reader, align int64) error {
	var head [16]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return err
	}
	if head[0] != 0x8e || head[1] != 0xad || head[2] != 0xe8 {
		return errors.New("bad header")
	}
	entries := int64(binary.BigEndian.Uint32(head[8:]))
	data := int64(binary.BigEndian.Uint32(head[12:]))
	_, err := io.CopyN(io.Discard, r, entries*16+(data+align-1)/align*align)
	return err
}

// readCpio calls take for each regular file of a "newc" archive.
func readCpio(r io.Reader, take func(name string, r io.Reader) error) error {
	const maxName = 4096
	for {
		var head [110]byte
		if _, err := io.ReadFull(r, head[:]); err != nil {
			return fmt.Errorf("read archive: %w", err)
		}
		if m := string(head[:6]); m != "070701" && m != "070702" {
			return errors.New("read archive: bad magic number")
		}
		var field [13]int64
		for i := range field {
			v, err := strconv.ParseUint(string(head[6+8*i:14+8*i]), 16, 32)
			if err != nil {
				return fmt.Errorf("read archive: %w", err)
			}
			field[i] = int64(v)
		}
		mode, size, nameSize := field[1], field[6], field[11]
		if nameSize == 0 || nameSize > maxName {
			return errors.New("read archive: bad name")
		}
		name := make([]byte, nameSize+(-(110+nameSize)&3))
		if _, err := io.ReadFull(r, name); err != nil {
			return fmt.Errorf("read archive: %w", err)
		}
		text := string(name[:nameSize-1])
		if text == "TRAILER!!!" {
			return nil
		}
		body := io.LimitReader(r, size)
		if mode&0o170000 == 0o100000 {
			if err := take(text, body); err != nil {
				return err
			}
		}
		if _, err := io.Copy(io.Discard, body); err != nil {
			return fmt.Errorf("read archive: %w", err)
		}
		if _, err := io.CopyN(io.Discard, r, -size&3); err != nil {
			return fmt.Errorf("read archive: %w", err)
		}
	}
}
