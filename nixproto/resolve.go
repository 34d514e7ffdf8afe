package nixproto

import (
	"fmt"
	"maps"
	"slices"
	"strings"
)

// Resolve returns the derivation that is built in place of d once the outputs
// of its input derivations are known, as Nix does (Derivation::tryResolve): the
// outputs become sources, placeholders of unknown outputs become paths, and
// deferred outputs get theirs. d is not changed; the result shares memory with
// it.
//
// output returns the path of an output of an input derivation; its error is
// passed on. A derivation without input derivations is returned as it is, but
// for deferred outputs.
func (d *Derivation) Resolve(output func(drv StorePath, name string) (StorePath, error)) (*Derivation, error) {
	r := *d
	r.InputDrvs = nil
	r.InputSrcs = slices.Clone(d.InputSrcs)
	var rewrites []string
	for _, drv := range d.References() { // sorted, so that errors are the same each time
		for _, name := range d.InputDrvs[drv] {
			path, err := output(drv, name)
			if err != nil {
				return nil, fmt.Errorf("resolve %s: output %q of %s: %w", clip(d.Name), clip(name), drv, err)
			}
			r.InputSrcs = append(r.InputSrcs, path)
			rewrites = append(rewrites, UpstreamPlaceholder(drv, name), string(path))
		}
	}
	slices.Sort(r.InputSrcs)
	r.InputSrcs = slices.Compact(r.InputSrcs)
	if len(rewrites) > 0 {
		r.rewrite(strings.NewReplacer(rewrites...))
	}
	return r.settle()
}

// rewrite replaces strings in everything that a builder sees.
func (d *Derivation) rewrite(r *strings.Replacer) {
	d.Builder = r.Replace(d.Builder)
	args := make([]string, len(d.Args))
	for i, a := range d.Args {
		args[i] = r.Replace(a)
	}
	d.Args = args
	env := make(map[string]string, len(d.Env))
	for key, value := range d.Env {
		env[r.Replace(key)] = r.Replace(value)
	}
	d.Env = env
}

// settle gives deferred outputs of a resolved derivation their paths.
func (d *Derivation) settle() (*Derivation, error) {
	kind, err := d.Kind()
	if err != nil || kind != Deferred {
		return d, err
	}
	paths, _, err := NewModulo(nil).OutputPaths(d) // there are no inputs to look up
	if err != nil {
		return nil, err
	}
	r := *d
	r.Outputs = make(map[string]DerivationOutput, len(paths))
	r.Env = maps.Clone(d.Env)
	for name, path := range paths {
		r.Outputs[name] = DerivationOutput{Path: path}
		r.Env[name] = string(path)
	}
	return &r, nil
}
