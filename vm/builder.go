package vm

import (
	"cmp"
	"fmt"
	"maps"
	"path"
	"slices"
	"strconv"
	"strings"

	"nbd/nixproto"
	"nbd/vm/link"
)

// What a builder is told, as Nix 2.34 tells it: arguments, environment and the
// files in the build directory. Everything here follows from a Spec alone.

// A SpecError says that a derivation asks for what no build is given, or that
// it is wrong in itself. It is the fault of whoever wrote the derivation; no
// guest was started.
type SpecError struct{ Message string } // one sentence for the client

func (e *SpecError) Error() string { return e.Message }

func specErrorf(format string, args ...any) error {
	return &SpecError{Message: fmt.Sprintf(format, args...)}
}

// buildDir is where the builder starts and may write.
const buildDir = "/build"

// maxProcesses bounds the processes and threads of one build, which is ended
// when it meets the bound. It is there for fork bombs: the largest honest builds
// use some hundreds for each of their cores. A guest's kernel has 32768 ids.
func maxProcesses(cores int) int { return min(2048+2048*cores, 28<<10) }

// maxOrder bounds the bytes of arguments, environment and files together: in
// base64 they fit into one frame, with certificates and the names of the inputs.
const maxOrder = 40 << 20

// A derivationLookup returns the derivation at a path of the inputs.
type derivationLookup func(nixproto.StorePath) (*nixproto.Derivation, error)

// orderBuild returns the order for a build. A derivation that cannot be
// built for reasons of its own is a *SpecError; other errors are lookup's,
// which is asked only if a reference graph with derivations in it is exported.
func orderBuild(spec *Spec, lookup derivationLookup) (*link.BuildOrder, error) {
	drv := spec.Drv
	kind, err := drv.Kind()
	if err != nil {
		return nil, specErrorf("%v", err)
	}
	opts, err := parseBuildOptions(drv)
	if err != nil {
		return nil, err
	}
	if err := opts.checkPure(spec.DrvPath); err != nil {
		return nil, err
	}
	order := newOrder(spec, opts, kind)
	if strings.HasPrefix(drv.Builder, link.BuiltinPrefix) {
		order.Env = variables(drv.Env)
		return order, checkOrder(order)
	}
	env := baseEnvironment(spec.Cores)
	files := map[string][]byte{}
	graph := &referenceGraph{inputs: spec.Inputs, derivation: lookup}
	if opts.structured != nil {
		err = addStructuredAttrs(env, files, spec, opts, graph)
	} else {
		err = addPlainAttrs(env, files, drv, opts, graph)
	}
	if err != nil {
		return nil, err
	}
	finishEnvironment(env, kind, opts)
	fillOrder(order, spec, env, files)
	return order, checkOrder(order)
}

// newOrder returns an order that lacks what the builder is told.
func newOrder(spec *Spec, opts *buildOptions, kind nixproto.DerivationKind) *link.BuildOrder {
	order := &link.BuildOrder{
		DrvPath:      string(spec.DrvPath),
		System:       spec.Drv.System,
		Builder:      spec.Drv.Builder,
		FixedOutput:  kind == nixproto.FixedOutput,
		KVM:          opts.kvm,
		CPUs:         spec.Cores,
		MemoryMiB:    spec.MemoryMiB,
		MaxProcesses: maxProcesses(spec.Cores),
	}
	for _, in := range spec.Inputs {
		order.Inputs = append(order.Inputs, in.Path.Base())
	}
	for _, o := range spec.Outputs {
		order.Outputs = append(order.Outputs, link.Output{Name: o.Name, Path: string(o.Path)})
	}
	return order
}

// variables returns an environment as a program gets it.
func variables(env map[string]string) (list [][]byte) {
	for _, name := range slices.Sorted(maps.Keys(env)) {
		list = append(list, []byte(name+"="+env[name]))
	}
	return list
}

// baseEnvironment is what a derivation may override.
func baseEnvironment(cores int) map[string]string {
	return map[string]string{
		"PATH":            "/path-not-set",
		"HOME":            "/homeless-shelter",
		"NIX_STORE":       nixproto.StoreDir,
		"NIX_BUILD_CORES": strconv.Itoa(cores),
	}
}

// finishEnvironment sets what a derivation cannot override.
func finishEnvironment(env map[string]string, kind nixproto.DerivationKind, opts *buildOptions) {
	for _, name := range []string{"NIX_BUILD_TOP", "TMPDIR", "TEMPDIR", "TMP", "TEMP", "PWD"} {
		env[name] = buildDir
	}
	if kind == nixproto.FixedOutput {
		env["NIX_OUTPUT_CHECKED"] = "1"
	}
	if kind == nixproto.FixedOutput || kind == nixproto.Impure {
		// Nix takes these from the environment of its daemon. Here there is
		// nothing to take: they are set and empty, as where they are not set.
		for _, name := range opts.impureEnvVars {
			env[name] = ""
		}
	}
	env["NIX_LOG_FD"] = "2"
	env["TERM"] = "xterm-256color"
}

// addPlainAttrs turns the attributes into variables, those named in passAsFile
// into files, and writes the reference graphs.
func addPlainAttrs(env map[string]string, files map[string][]byte, drv *nixproto.Derivation, opts *buildOptions, graph *referenceGraph) error {
	// In the order of names, because textPath may be there beside text.
	for _, name := range slices.Sorted(maps.Keys(drv.Env)) {
		if !slices.Contains(opts.passAsFile, name) {
			env[name] = drv.Env[name]
			continue
		}
		file := ".attr-" + nixproto.SumSHA256([]byte(name)).Base32()
		files[file] = []byte(drv.Env[name])
		env[name+"Path"] = buildDir + "/" + file
	}
	for _, g := range opts.graphs {
		closure, err := graph.export(g.paths)
		if err != nil {
			return err
		}
		files[g.name] = graph.registration(closure)
	}
	return nil
}

// fillOrder puts arguments, environment and files into the order, with the
// placeholders of the derivation's own outputs replaced by their paths.
func fillOrder(order *link.BuildOrder, spec *Spec, env map[string]string, files map[string][]byte) {
	var pairs []string
	for _, o := range spec.Outputs {
		pairs = append(pairs, nixproto.Placeholder(o.Name), string(o.Path))
	}
	placeholders := strings.NewReplacer(pairs...)
	order.Args = append(order.Args, []byte(path.Base(spec.Drv.Builder)))
	for _, arg := range spec.Drv.Args {
		order.Args = append(order.Args, []byte(placeholders.Replace(arg)))
	}
	for _, name := range slices.Sorted(maps.Keys(env)) {
		order.Env = append(order.Env, []byte(placeholders.Replace(name+"="+env[name])))
	}
	for _, name := range slices.Sorted(maps.Keys(files)) {
		data := []byte(placeholders.Replace(string(files[name])))
		order.Files = append(order.Files, link.File{Name: name, Data: data})
	}
}

// checkOrder refuses what cannot be handed over.
func checkOrder(order *link.BuildOrder) error {
	size := 0
	for _, b := range slices.Concat([][]byte{[]byte(order.Builder)}, order.Args, order.Env) {
		if slices.Contains(b, 0) {
			return specErrorf("derivation '%s' has a zero byte in its builder, arguments or environment", order.DrvPath)
		}
		size += len(b)
	}
	for _, f := range order.Files {
		size += len(f.Data)
	}
	if size > maxOrder {
		return specErrorf("derivation '%s' hands its builder %d bytes of arguments, environment and files, which is more than %d",
			order.DrvPath, size, maxOrder)
	}
	return nil
}

// A graphRequest asks for the reference graph of paths in the file, or under
// the attribute, name.
type graphRequest struct {
	name  string
	paths []nixproto.StorePath
}

// buildOptions are the attributes that mean something to whoever runs a build.
type buildOptions struct {
	// structured is the object of __structuredAttrs, nil without.
	structured    map[string]any
	passAsFile    []string
	graphs        []graphRequest // sorted by name
	impureEnvVars []string
	impureHost    []string
	noChroot      bool
	kvm           bool
}

// checkPure refuses what only an unrestricted builder could give.
func (o *buildOptions) checkPure(drv nixproto.StorePath) error {
	if o.noChroot {
		return specErrorf("derivation '%s' has '__noChroot' set, but that's not allowed when 'sandbox' is 'true'", drv)
	}
	if len(o.impureHost) > 0 {
		return specErrorf("derivation '%s' requested impure path '%s', but it was not in allowed-impure-host-deps", drv, o.impureHost[0])
	}
	return nil
}

// sortedGraphs orders requests by name; of two with one name the last counts.
func sortedGraphs(graphs []graphRequest) []graphRequest {
	last := map[string]graphRequest{}
	for _, g := range graphs {
		last[g.name] = g
	}
	return slices.SortedFunc(maps.Values(last), func(a, b graphRequest) int { return cmp.Compare(a.name, b.name) })
}
