package nixproto

import (
	"fmt"
	"maps"
	"slices"
)

// fields is BuildResult from worker version 1.32 and serve version 2.5 on.
func (b *BuildResult) fields(c codec) {
	c.u64((*uint64)(&b.Status))
	c.str(&b.Error, MaxMessage)
	c.u64(&b.TimesBuilt)
	c.bool(&b.NonDeterministic)
	c.i64(&b.StartTime)
	c.i64(&b.StopTime)
	if !c.v.serve() && c.v.Minor() >= 37 {
		optionalInt64(c, &b.CPUUser)
		optionalInt64(c, &b.CPUSystem)
	}
	if c.v.serve() && c.v.Minor() < 6 {
		return
	}
	if c.reading() {
		b.Outputs = c.r.builtOutputs()
	} else {
		writeBuiltOutputs(c.w, b.Outputs)
	}
}

func optionalInt64(c codec, p **int64) {
	present := *p != nil
	c.bool(&present)
	if !present {
		return
	}
	if c.reading() {
		*p = new(int64)
	}
	c.i64(*p)
}

// builtOutputs reads outputs keyed by "sha256:<hex>!<output>", each a
// realisation as JSON, which has to be of that key.
func (r *Reader) builtOutputs() map[string]Realisation {
	outputs := map[string]Realisation{}
	for range r.count(maxItems, structCost) {
		var key, real Realisation
		drvOutput(codec{r: r}, &key.DrvHash, &key.OutputName)
		realisationJSON(codec{r: r}, &real)
		if r.err != nil {
			return nil
		}
		if r.bad == nil && key.ID() != real.ID() {
			r.reject(fmt.Errorf("realisation of %q under the key %q", real.ID(), key.ID()))
		}
		if _, twice := outputs[real.OutputName]; twice {
			r.reject(fmt.Errorf("output %q comes twice", clip(real.OutputName)))
		}
		outputs[real.OutputName] = real
	}
	return outputs
}

func writeBuiltOutputs(w *Writer, outputs map[string]Realisation) {
	w.Uint64(uint64(len(outputs)))
	for _, name := range slices.Sorted(maps.Keys(outputs)) {
		real := outputs[name]
		w.Str(real.ID())
		realisationJSON(codec{w: w}, &real)
	}
}

// maxRealisation is the longest JSON of a realisation, in bytes: with its
// dependencies, as Nix 2.8 and 2.26 list them, thousands of lines.
const maxRealisation = 4 << 20

// realisationJSON is a realisation as a string.
func realisationJSON(c codec, real *Realisation) {
	if !c.reading() {
		c.w.Bytes(real.JSON())
		return
	}
	text := c.r.bytes(maxRealisation)
	if c.r.err != nil {
		return
	}
	var err error
	if *real, err = ParseRealisation(text); err != nil {
		c.r.reject(err)
	}
}

// drvOutput is the key of a realisation as a string.
func drvOutput(c codec, hash *Hash, output *string) {
	if !c.reading() {
		c.w.Str(Realisation{DrvHash: *hash, OutputName: *output}.ID())
		return
	}
	var err error
	if *hash, *output, err = ParseRealisationID(c.r.str(maxSmall)); err != nil {
		c.r.reject(err)
	}
}
