package vm

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// A Kernel is a kernel image and the folder of its modules.
type Kernel struct {
	// Name is the kernel release, for example 6.1.0-56-cloud-amd64.
	Name string `json:"name"`
	// Arch is the architecture that it is for, as uname -m tells it.
	Arch string `json:"arch"`
	// Image is the path of the image, Modules that of the folder in and below
	// which its modules lie.
	Image   string `json:"image"`
	Modules string `json:"modules"`
	// Imported reports that it lies in the state directory.
	Imported bool `json:"imported"`
}

// kernelsDir is where imported kernels lie in the state directory, each in a
// folder of its name with the image and the folder of the modules.
const (
	kernelsDir    = "kernels"
	importedImage = "vmlinuz"
	importedFiles = "modules"
)

// Kernels lists the kernels that guests could run: the imported ones, then the
// host's, each group with the newest first.
func Kernels(stateDir string) ([]Kernel, error) {
	imported, err := importedKernels(stateDir)
	if err != nil {
		return nil, fmt.Errorf("list kernels: %w", err)
	}
	return append(imported, hostKernels("/")...), nil
}

func importedKernels(stateDir string) ([]Kernel, error) {
	dir := filepath.Join(stateDir, kernelsDir)
	entries, err := os.ReadDir(dir)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	var list []Kernel
	for _, e := range entries {
		if e.IsDir() && checkKernelName(e.Name()) == nil {
			list = append(list, importedKernel(dir, e.Name()))
		}
	}
	newestFirst(list)
	return list, nil
}

// importedKernel returns what lies below dir under a name.
func importedKernel(dir, name string) Kernel {
	k := Kernel{
		Name: name, Imported: true, Arch: archX8664.name,
		Image: filepath.Join(dir, name, importedImage), Modules: filepath.Join(dir, name, importedFiles),
	}
	// One that cannot be read is told of where it is to be used.
	if a, _, err := imageAt(k.Image); err == nil {
		k.Arch = a.name
	}
	return k
}

// hostKernels finds the installed kernels of the distributions below root:
// Debian keeps images in /boot, Fedora (and Debian from 14 on) beside the
// modules, NixOS in the system's profile.
func hostKernels(root string) []Kernel {
	var list []Kernel
	seen := map[string]bool{}
	add := func(image, modules string) {
		name := filepath.Base(modules)
		if info, err := os.Stat(image); err == nil && info.Mode().IsRegular() && !seen[name] {
			seen[name] = true
			list = append(list, Kernel{Name: name, Arch: hostArchName(), Image: image, Modules: modules})
		}
	}
	for _, base := range []string{"lib/modules", "usr/lib/modules"} {
		for _, modules := range folders(filepath.Join(root, base)) {
			add(filepath.Join(root, "boot", "vmlinuz-"+filepath.Base(modules)), modules)
			add(filepath.Join(modules, "vmlinuz"), modules)
		}
	}
	for _, system := range []string{"run/booted-system", "run/current-system"} {
		at := filepath.Join(root, system)
		for _, modules := range folders(filepath.Join(at, "kernel-modules/lib/modules")) {
			add(filepath.Join(at, "kernel"), modules)
		}
	}
	newestFirst(list)
	return list
}

// folders returns the folders in dir, none if it cannot be read.
func folders(dir string) []string {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil
	}
	var out []string
	for _, e := range entries {
		if path := filepath.Join(dir, e.Name()); isDir(path) {
			out = append(out, path)
		}
	}
	return out
}

// newestFirst sorts by version.
func newestFirst(list []Kernel) {
	slices.SortStableFunc(list, func(a, b Kernel) int { return compareVersions(b.Name, a.Name) })
}

// compareVersions compares text with numbers in it: runs of digits by value,
// the rest bytewise.
func compareVersions(a, b string) int {
	for a != "" && b != "" {
		na, nb := digits(a), digits(b)
		if na == 0 || nb == 0 {
			if a[0] != b[0] {
				return cmp.Compare(a[0], b[0])
			}
			a, b = a[1:], b[1:]
			continue
		}
		x, y := strings.TrimLeft(a[:na], "0"), strings.TrimLeft(b[:nb], "0")
		if c := cmp.Or(cmp.Compare(len(x), len(y)), cmp.Compare(x, y)); c != 0 {
			return c
		}
		a, b = a[na:], b[nb:]
	}
	return cmp.Compare(len(a), len(b))
}

// digits returns how many digits s starts with.
func digits(s string) int { return len(s) - len(strings.TrimLeft(s, "0123456789")) }

// findKernel returns the kernel for guests of an architecture that Config.Kernel
// asks for, which counts for the architecture of the kernel that it names.
func findKernel(stateDir, want string, a *arch) (Kernel, error) {
	if strings.Contains(want, "/") {
		if a.name == hostArchName() {
			return kernelAt(want, a)
		}
		want = ""
	}
	list, err := Kernels(stateDir)
	if err != nil {
		return Kernel{}, err
	}
	if slices.ContainsFunc(list, func(k Kernel) bool { return k.Name == want && k.Arch != a.name }) {
		want = ""
	}
	var unreadable error
	for _, k := range list {
		if k.Arch != a.name || want != "" && k.Name != want {
			continue
		}
		f, err := os.Open(k.Image)
		if err == nil {
			return k, f.Close()
		}
		unreadable = err
	}
	what := "no kernel for " + a.name + " guests was found"
	if want != "" {
		what = "there is no kernel named " + want
	}
	if unreadable != nil {
		what = fmt.Sprintf("the kernel for guests cannot be read: %v", unreadable)
	}
	return Kernel{}, &MissingError{What: what, Hint: a.kernelHint()}
}

// kernelHint says how to get a kernel.
func (a *arch) kernelHint() string {
	if a.name != hostArchName() {
		return fmt.Sprintf("take a distribution's package of one, which need not fit this machine, such as Debian's linux-image-…-cloud-%s.deb, and nbd kernel import FILE", a.goarch)
	}
	return fmt.Sprintf("Debian: apt install linux-image-cloud-%s; or, with nothing installed, take its package with apt-get download and nbd kernel import FILE", a.goarch)
}

// kernelAt returns the kernel at a path, with the modules of its release.
func kernelAt(image string, a *arch) (Kernel, error) {
	of, release, err := imageAt(image)
	if err != nil {
		return Kernel{}, err
	}
	if of != a {
		return Kernel{}, fmt.Errorf("the kernel %s is for %s and not for %s", image, of.name, a.name)
	}
	if release == "" {
		release = strings.TrimPrefix(filepath.Base(image), "vmlinuz-")
	}
	for _, dir := range []string{"/lib/modules", "/usr/lib/modules", "/run/booted-system/kernel-modules/lib/modules"} {
		if at := filepath.Join(dir, release); isDir(at) {
			return Kernel{Name: release, Arch: a.name, Image: image, Modules: at}, nil
		}
	}
	return Kernel{}, &MissingError{
		What: fmt.Sprintf("the modules of the kernel %s (%s) are not in /lib/modules", image, release),
		Hint: "import a folder with both: nbd kernel import DIR",
	}
}

// imageAt identifies the kernel image at path.
func imageAt(path string) (*arch, string, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, "", fmt.Errorf("open kernel: %w", err)
	}
	defer f.Close()
	head, err := io.ReadAll(io.LimitReader(f, imageHead))
	if err != nil {
		return nil, "", fmt.Errorf("read kernel %s: %w", path, err)
	}
	a, release, err := identifyImage(head)
	if err != nil {
		return nil, "", fmt.Errorf("read kernel %s: %w", path, err)
	}
	return a, release, nil
}

// checkKernelName refuses releases that are not fit for a file name.
func checkKernelName(name string) error {
	if name == "" || len(name) > 64 || name[0] < '0' || name[0] > '9' {
		return fmt.Errorf("bad kernel release %.80q", name)
	}
	for i := range len(name) {
		c := name[i]
		if !(c >= '0' && c <= '9' || c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || strings.IndexByte(".-_+~", c) >= 0) {
			return fmt.Errorf("bad kernel release %.80q", name)
		}
	}
	return nil
}
