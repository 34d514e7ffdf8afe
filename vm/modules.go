package vm

import (
	"bytes"
	"compress/gzip"
	"debug/elf"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/klauspost/compress/zstd"
	"github.com/ulikunitz/xz"
)

// guestModules are what a guest cannot do without, where the kernel has them as
// modules; what a kernel has built in is not found and not missed. The order is
// that of need: transport first, since without a console nothing is told.
var guestModules = []string{
	"virtio_pci", "virtio_console", "virtio_blk", "virtio_rng", "virtio_net",
	"erofs", "ext4", "overlay", "pvpanic_pci",
}

// maxModule bounds a module's size, unpacked.
const maxModule = 64 << 20

// A module is one kernel module, unpacked.
type module struct {
	name string // with underscores
	data []byte
}

// loadModules returns the wanted modules found under dir (a /lib/modules/V
// folder) and what they need, each after what it needs. The order comes from
// the modules themselves (.modinfo: depends and softdep), since packages hold
// no modules.dep: depmod makes that when they are installed.
func loadModules(dir string, want []string) ([]module, error) {
	files, err := moduleFiles(dir)
	if err != nil {
		return nil, fmt.Errorf("find kernel modules: %w", err)
	}
	var order []module
	loaded := map[string]bool{}
	parsed := map[string]module{}
	needs := map[string][]string{}
	// The stack holds names to visit; a name seen for the second time has all
	// its needs in order already.
	stack := reversed(want)
	for len(stack) > 0 {
		name := stack[len(stack)-1]
		path, ok := files[name]
		if !ok || loaded[name] {
			stack = stack[:len(stack)-1]
			continue
		}
		if m, seen := parsed[name]; seen {
			order, loaded[name] = append(order, m), true
			stack = stack[:len(stack)-1]
			continue
		}
		data, err := readModule(path)
		if err != nil {
			return nil, fmt.Errorf("read kernel module %s: %w", path, err)
		}
		if needs[name], err = moduleNeeds(data); err != nil {
			return nil, fmt.Errorf("read kernel module %s: %w", path, err)
		}
		parsed[name] = module{name, data}
		for _, n := range reversed(needs[name]) {
			if n = provider(files, n); parsed[n].data == nil {
				stack = append(stack, n)
			}
		}
	}
	return order, nil
}

// provider returns the module that stands for a needed name. Soft dependencies
// name crypto algorithms, which are aliases; the plain implementation of x is
// x_generic.
func provider(files map[string]string, name string) string {
	if _, ok := files[name]; !ok {
		if _, ok := files[name+"_generic"]; ok {
			return name + "_generic"
		}
	}
	return name
}

func reversed(s []string) []string {
	r := make([]string, 0, len(s))
	for i := len(s) - 1; i >= 0; i-- {
		r = append(r, s[i])
	}
	return r
}

// moduleName returns the name of a module of a file name such as
// "virtio-rng.ko.xz": what is before the first dot, with underscores.
func moduleName(base string) (string, bool) {
	name, ext, ok := strings.Cut(base, ".")
	switch ext {
	case "ko", "ko.xz", "ko.zst", "ko.gz":
	default:
		return "", false
	}
	return strings.ReplaceAll(name, "-", "_"), ok && name != ""
}

// moduleFiles maps the names of the modules under dir to their files. Symbolic
// links are followed, as NixOS joins packages with them.
func moduleFiles(dir string) (map[string]string, error) {
	const maxDirs = 100_000 // more is a loop of links
	files := map[string]string{}
	todo := []string{dir}
	for n := 0; len(todo) > 0; n++ {
		if n == maxDirs {
			return nil, errors.New("too many folders")
		}
		d := todo[0]
		todo = todo[1:]
		entries, err := os.ReadDir(d)
		if err != nil {
			return nil, err
		}
		for _, e := range entries {
			path := filepath.Join(d, e.Name())
			if e.Name() == "build" || e.Name() == "source" {
				continue // links to the kernel's sources
			}
			if e.IsDir() || e.Type()&fs.ModeSymlink != 0 && isDir(path) {
				todo = append(todo, path)
			} else if name, ok := moduleName(e.Name()); ok {
				files[name] = path
			}
		}
	}
	return files, nil
}

func isDir(path string) bool {
	info, err := os.Stat(path)
	return err == nil && info.IsDir()
}

// readModule returns the module in a file, unpacked.
func readModule(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	r, err := decompressor(f, filepath.Ext(path))
	if err != nil {
		return nil, err
	}
	data, err := io.ReadAll(io.LimitReader(r, maxModule+1))
	if err != nil {
		return nil, err
	}
	if len(data) > maxModule {
		return nil, fmt.Errorf("larger than %d bytes", maxModule)
	}
	return data, nil
}

// decompressor returns a reader of r's contents unpacked, by the extension of
// its name; other extensions are not compressed.
func decompressor(r io.Reader, ext string) (io.Reader, error) {
	switch ext {
	case ".xz":
		return xz.ReaderConfig{DictCap: 64 << 20}.NewReader(r)
	case ".zst":
		d, err := zstd.NewReader(r, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxWindow(128<<20))
		if err != nil {
			return nil, err
		}
		return d.IOReadCloser(), nil
	case ".gz":
		return gzip.NewReader(r)
	}
	return r, nil
}

// moduleNeeds returns the names of the modules that must be loaded before the
// given one: its dependencies, and what its soft dependencies ask for first.
func moduleNeeds(data []byte) ([]string, error) {
	info, _, err := modinfo(data)
	if err != nil {
		return nil, err
	}
	return parseModinfo(info), nil
}

// moduleRelease returns the release of the kernel that a module was built for,
// "" if it does not tell, and the machine.
func moduleRelease(data []byte) (string, elf.Machine, error) {
	info, machine, err := modinfo(data)
	if err != nil {
		return "", 0, err
	}
	for entry := range strings.SplitSeq(string(info), "\x00") {
		if magic, ok := strings.CutPrefix(entry, "vermagic="); ok {
			release, _, _ := strings.Cut(magic, " ")
			return release, machine, nil
		}
	}
	return "", machine, nil
}

// modinfo returns what a module tells of itself. The format is that of the
// kernel's MODULE_INFO: NUL-terminated "key=value" strings in the section
// .modinfo.
func modinfo(data []byte) ([]byte, elf.Machine, error) {
	f, err := elf.NewFile(bytes.NewReader(data))
	if err != nil {
		return nil, 0, err
	}
	s := f.Section(".modinfo")
	if s == nil {
		return nil, 0, errors.New("no .modinfo section")
	}
	if s.Size > uint64(len(data)) {
		return nil, 0, errors.New(".modinfo section is larger than the file")
	}
	info, err := s.Data()
	if err != nil {
		return nil, 0, fmt.Errorf("read .modinfo: %w", err)
	}
	return info, f.Machine, nil
}

// parseModinfo returns the needs told in the contents of .modinfo, soft ones
// first.
func parseModinfo(info []byte) []string {
	var hard, soft []string
	for entry := range strings.SplitSeq(string(info), "\x00") {
		key, value, _ := strings.Cut(entry, "=")
		switch key {
		case "depends":
			for name := range strings.SplitSeq(value, ",") {
				if name = strings.ReplaceAll(name, "-", "_"); name != "" {
					hard = append(hard, name)
				}
			}
		case "softdep":
			pre := false
			for _, word := range strings.Fields(value) {
				if strings.HasSuffix(word, ":") {
					pre = word == "pre:"
				} else if pre {
					soft = append(soft, strings.ReplaceAll(word, "-", "_"))
				}
			}
		}
	}
	return append(soft, hard...)
}
