package vm

// A Kernel is a kernel image and the folder of its modules.
type Kernel struct {
	// Name is the kernel release, for example 6.1.0-56-cloud-amd64.
	Name string `json:"name"`
	// Image is the path of the bzImage, Modules that of its /lib/modules/V
	// folder.
	Image   string `json:"image"`
	Modules string `json:"modules"`
	// Imported reports that it lies in the state directory.
	Imported bool `json:"imported"`
}

// ImportKernel takes a kernel out of a distribution's package (.deb, .rpm) or
// from a folder that holds vmlinuz and its modules, keeps it in stateDir and
// returns it. A kernel of the same name is replaced.
func ImportKernel(stateDir, path string) (Kernel, error) { return Kernel{}, nil }

// Kernels lists the kernels that guests could run, the imported ones first,
// each group with the newest first.
func Kernels(stateDir string) ([]Kernel, error) { return nil, nil }
