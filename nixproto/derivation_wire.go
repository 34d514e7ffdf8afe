package nixproto

import (
	"fmt"
	"maps"
	"slices"
	"strings"
)

// basicDerivation is a derivation's path and the derivation without its input
// derivations, as BuildDerivation of both protocols sends them.
func basicDerivation(c codec, path *StorePath, drv **Derivation) {
	c.path(path)
	if c.reading() {
		*drv = new(Derivation)
		if path.IsDerivation() {
			(*drv).Name = strings.TrimSuffix(path.Name(), ".drv")
		} else if *path != "" {
			c.r.reject(fmt.Errorf("%q does not name a derivation", *path))
		}
	}
	(*drv).basicFields(c)
}

func (d *Derivation) basicFields(c codec) {
	d.outputFields(c)
	c.paths(&d.InputSrcs)
	c.str(&d.System, MaxMessage)
	c.str(&d.Builder, MaxMessage)
	c.strings(&d.Args)
	c.stringMap(&d.Env)
}

func (d *Derivation) outputFields(c codec) {
	if c.reading() {
		d.Outputs = c.r.derivationOutputs()
		return
	}
	c.w.Uint64(uint64(len(d.Outputs)))
	for _, name := range slices.Sorted(maps.Keys(d.Outputs)) {
		out := d.Outputs[name]
		c.w.Str(name)
		c.w.Path(out.Path)
		c.w.Str(out.HashAlgo)
		c.w.Str(out.Hash)
	}
}

func (r *Reader) derivationOutputs() map[string]DerivationOutput {
	outputs := map[string]DerivationOutput{}
	for range r.count(maxItems, structCost) {
		name := r.str(maxSmall)
		out := DerivationOutput{Path: r.optPath(), HashAlgo: r.str(maxSmall), Hash: r.str(maxSmall)}
		if r.err != nil {
			return nil
		}
		if err := CheckName(name); err != nil {
			r.reject(fmt.Errorf("output of a derivation: %w", err))
		}
		if _, twice := outputs[name]; twice {
			r.reject(fmt.Errorf("output %q comes twice", clip(name)))
		}
		outputs[name] = out
	}
	return outputs
}
