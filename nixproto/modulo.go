package nixproto

import (
	"errors"
	"fmt"
	"slices"
)

// ErrOutputPath says that a derivation states another path for an output than
// the one that follows from it.
var ErrOutputPath = errors.New("output path does not follow from the derivation")

// A Modulo computes hashes of derivations modulo their fixed-output inputs, and
// from them the paths of outputs (Nix's hashDerivationModulo; "Input-addressing
// derivation outputs" in its manual). It remembers, for each derivation that it
// met, a hash and the names of its outputs. It is used by one goroutine at a
// time.
//
// The hash of an input derivation takes the place of its path, so that the
// output paths of what depends on a fixed output stay the same however it is
// fetched. Inputs are gone through without recursion: chains of derivations may
// be as long as they like.
type Modulo struct {
	lookup func(StorePath) (*Derivation, error)
	memo   map[StorePath]*moduloHash // nil while it is being computed
}

// A moduloHash is what Modulo knows of a derivation.
type moduloHash struct {
	hash     Hash
	deferred bool // an output path follows from a build, here or below
	outputs  []string
}

// NewModulo returns a Modulo that gets derivations from lookup, which has to
// return the one whose DrvPath is the path asked for: the hashes are as right as
// that is. Modulo may ask for the same one twice, and keeps none of them.
func NewModulo(lookup func(StorePath) (*Derivation, error)) *Modulo {
	return &Modulo{lookup: lookup, memo: map[StorePath]*moduloHash{}}
}

// Hash returns the hash modulo that stands for the derivation at path where it
// is an input. It is deferred if paths of outputs, its own or of inputs, are
// known only after a build.
func (m *Modulo) Hash(path StorePath) (hash Hash, deferred bool, err error) {
	h, err := m.get(path)
	if err != nil {
		return Hash{}, false, err
	}
	return h.hash, h.deferred, nil
}

// RealisationHash returns the hash modulo of d that its realisations are keyed
// by, the one that Nix calls static output hash.
func (m *Modulo) RealisationHash(d *Derivation) (Hash, error) {
	h, err := m.masked(d)
	return h.hash, err
}

// OutputPaths returns the paths that follow from d for its outputs, whatever it
// states; ok is false if they follow only from a build.
func (m *Modulo) OutputPaths(d *Derivation) (paths map[string]StorePath, ok bool, err error) {
	kind, err := d.Kind()
	if err != nil {
		return nil, false, err
	}
	switch kind {
	case FixedOutput:
		path, err := d.fixedPath()
		return map[string]StorePath{"out": path}, err == nil, err
	case Floating, Impure:
		return nil, false, nil
	}
	h, err := m.masked(d)
	if err != nil || h.deferred {
		return nil, false, err
	}
	paths = map[string]StorePath{}
	for name := range d.Outputs {
		path, err := makeStorePath("output:"+name, h.hash, OutputPathName(d.Name, name))
		if err != nil {
			return nil, false, d.invalid("output %q: %w", clip(name), err)
		}
		paths[name] = path
	}
	return paths, true, nil
}

// Check recomputes the output paths of d, and returns an error that wraps
// ErrOutputPath if d states others, in its outputs or in the environment
// variables with their names. A floating, impure or deferred derivation states
// none.
func (m *Modulo) Check(d *Derivation) error {
	paths, ok, err := m.OutputPaths(d)
	if err != nil {
		return err
	}
	for _, name := range d.OutputNames() {
		stated := d.Outputs[name].Path
		if stated == "" {
			continue // deferred, or it follows from a build
		}
		if !ok {
			return fmt.Errorf("%w: output %q of %q depends on outputs that are not known", ErrOutputPath, name, clip(d.Name))
		}
		if stated != paths[name] {
			return fmt.Errorf("%w: output %q of %q is %s, not %s", ErrOutputPath, name, clip(d.Name), paths[name], stated)
		}
		if env, set := d.Env[name]; set && env != string(stated) {
			return fmt.Errorf("%w: variable %q of %q is %q, not %s", ErrOutputPath, name, clip(d.Name), clip(env), stated)
		}
	}
	return nil
}

// fixedPath returns the path that follows from the hash of a fixed output.
func (d *Derivation) fixedPath() (StorePath, error) {
	ca, err := d.Outputs["out"].ContentAddress()
	if err != nil {
		return "", d.invalid("%w", err)
	}
	path, err := ca.Path(OutputPathName(d.Name, "out"), nil, false)
	if err != nil {
		return "", d.invalid("%w", err)
	}
	return path, nil
}

// fixedModulo returns the hash that stands for a fixed output.
func (d *Derivation) fixedModulo() (Hash, error) {
	path, err := d.fixedPath()
	if err != nil {
		return Hash{}, err
	}
	out := d.Outputs["out"]
	return SumSHA256([]byte("fixed:out:" + out.HashAlgo + ":" + out.Hash + ":" + string(path))), nil
}

// impureModulo stands for every output of an impure derivation.
var impureModulo = SumSHA256([]byte("impure"))

// A moduloFrame is a derivation whose inputs are not all known yet.
type moduloFrame struct {
	path    StorePath
	pending []StorePath
}

// get returns the hash of the derivation at root, and computes those of what it
// depends on.
func (m *Modulo) get(root StorePath) (*moduloHash, error) {
	if h := m.memo[root]; h != nil {
		return h, nil
	}
	var stack []moduloFrame
	defer func() { // of an error: what is in progress was not computed
		for _, f := range stack {
			delete(m.memo, f.path)
		}
	}()
	stack = append(stack, moduloFrame{"", []StorePath{root}})
	for {
		top := &stack[len(stack)-1]
		if len(top.pending) == 0 {
			if top.path == "" {
				return m.memo[root], nil
			}
			if err := m.finish(top.path); err != nil {
				return nil, err
			}
			stack = stack[:len(stack)-1]
			continue
		}
		next := top.pending[len(top.pending)-1]
		top.pending = top.pending[:len(top.pending)-1]
		h, seen := m.memo[next]
		switch {
		case h != nil:
			continue
		case seen:
			return nil, fmt.Errorf("hash derivation %s: it depends on itself", next)
		}
		pending, err := m.unknownInputs(next)
		if err != nil {
			return nil, err
		}
		m.memo[next] = nil
		stack = append(stack, moduloFrame{next, pending})
	}
}

// unknownInputs returns the inputs of a derivation that have no hash yet.
func (m *Modulo) unknownInputs(path StorePath) ([]StorePath, error) {
	d, err := m.lookup(path)
	if err != nil {
		return nil, fmt.Errorf("hash derivation %s: %w", path, err)
	}
	kind, err := d.Kind()
	if err != nil {
		return nil, err
	}
	if kind == FixedOutput || kind == Impure {
		return nil, nil // its hash depends on no input
	}
	return m.unknown(d), nil
}

func (m *Modulo) unknown(d *Derivation) []StorePath {
	var unknown []StorePath
	for drv := range d.InputDrvs {
		if m.memo[drv] == nil {
			unknown = append(unknown, drv)
		}
	}
	slices.Sort(unknown) // for the same order of errors each time
	return unknown
}

// finish computes the hash of a derivation whose inputs have one. It asks for
// the derivation again: of a long chain only paths are in memory.
func (m *Modulo) finish(path StorePath) error {
	d, err := m.lookup(path)
	if err != nil {
		return fmt.Errorf("hash derivation %s: %w", path, err)
	}
	h, err := m.hash(d, false)
	if err != nil {
		return fmt.Errorf("hash derivation %s: %w", path, err)
	}
	m.memo[path] = &h
	return nil
}

// masked returns the hash modulo of d without its output paths.
func (m *Modulo) masked(d *Derivation) (moduloHash, error) {
	kind, err := d.Kind()
	if err != nil {
		return moduloHash{}, err
	}
	if kind != FixedOutput && kind != Impure {
		for _, drv := range m.unknown(d) {
			if _, err := m.get(drv); err != nil {
				return moduloHash{}, err
			}
		}
	}
	return m.hash(d, true)
}

// hash returns the hash of d, whose inputs have one.
func (m *Modulo) hash(d *Derivation, mask bool) (moduloHash, error) {
	kind, err := d.Kind()
	if err != nil {
		return moduloHash{}, err
	}
	h := moduloHash{outputs: d.OutputNames()}
	switch kind {
	case FixedOutput:
		h.hash, err = d.fixedModulo()
		return h, err
	case Impure:
		h.hash, h.deferred = impureModulo, true
		return h, nil
	}
	h.deferred = kind != InputAddressed && kind != Deferred
	// Inputs with equal hashes, such as the same file fetched in two ways,
	// become one.
	merged := map[string][]string{}
	for drv, outputs := range d.InputDrvs {
		in := m.memo[drv]
		if in == nil {
			return h, fmt.Errorf("input %s: not known", drv)
		}
		h.deferred = h.deferred || in.deferred
		for _, name := range outputs {
			if _, ok := slices.BinarySearch(in.outputs, name); !ok {
				return h, d.invalid("input %s has no output %q", drv, clip(name))
			}
		}
		if len(outputs) > 0 {
			key := in.hash.Base16()
			merged[key] = append(merged[key], outputs...)
		}
	}
	inputs := make([]atermInput, 0, len(merged))
	for key, outputs := range merged {
		inputs = append(inputs, atermInput{key, outputs})
	}
	h.hash = SumSHA256(d.appendATerm(nil, inputs, mask))
	return h, nil
}
