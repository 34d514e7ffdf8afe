package store

import (
	"fmt"
	"io"
	"slices"
	"strings"

	"nbd/nixproto"
	"nbd/nixproto/nar"
)

// maxDerivation is the size of the largest NAR of a .drv file that is accepted.
const maxDerivation = nixproto.MaxMessage

// A contentCheck compares what a record says of its content with the content,
// whose NAR is written to it: the content address, and that a .drv file is a
// derivation. It is used by one goroutine.
type contentCheck struct {
	rec    *record
	hasher *nixproto.CAHasher // nil if there is nothing to hash
	ca     nixproto.ContentAddress
	nar    []byte // of a .drv file
}

// newContentCheck checks that the path of a record follows from its content
// address, and returns the check of its content. Errors are ErrInvalid.
func newContentCheck(r *record) (*contentCheck, error) {
	c := &contentCheck{rec: r}
	err := nixproto.CheckCA(&r.PathInfo)
	if err == nil && !r.Path.IsDerivation() {
		c.hasher, c.ca, err = nixproto.CAHasherFor(&r.PathInfo)
	}
	if err != nil {
		return nil, fmt.Errorf("%w content address: %w", ErrInvalid, err)
	}
	if r.Path.IsDerivation() && r.NarSize > maxDerivation {
		return nil, fmt.Errorf("%w derivation: larger than %d bytes", ErrInvalid, maxDerivation)
	}
	return c, nil
}

// Write takes bytes of the NAR, which is well-formed.
func (c *contentCheck) Write(p []byte) (int, error) {
	if c.rec.Path.IsDerivation() {
		c.nar = append(c.nar, p...)
	}
	if c.hasher == nil {
		return len(p), nil
	}
	if _, err := c.hasher.Write(p); err != nil {
		return 0, fmt.Errorf("%w content: %w", ErrInvalid, err)
	}
	return len(p), nil
}

// finish ends the check of a NAR with that index. It completes the record of a
// derivation.
func (c *contentCheck) finish(x nar.Index) error {
	if c.hasher != nil {
		if err := c.hasher.Check(c.ca); err != nil {
			return fmt.Errorf("%w content address: %w", ErrInvalid, err)
		}
	}
	if c.rec.Path.IsDerivation() {
		return c.derivation(x)
	}
	return nil
}

// read takes the whole NAR from r and ends the check.
func (c *contentCheck) read(r io.ReaderAt, x nar.Index) error {
	if c.hasher != nil || c.rec.Path.IsDerivation() {
		all := io.NewSectionReader(r, 0, int64(c.rec.NarSize))
		if _, err := io.CopyBuffer(c, all, make([]byte, min(c.rec.NarSize, 512<<10))); err != nil {
			return err
		}
	}
	return c.finish(x)
}

// derivation checks that the .drv file can be parsed, refers to its inputs and
// to nothing else, and lies at the path of its text. The record gets its
// outputs, and its content address if it has none.
func (c *contentCheck) derivation(x nar.Index) error {
	if x[0].Kind != nar.Regular || x[0].Executable {
		return fmt.Errorf("%w derivation: it is not a plain file", ErrInvalid)
	}
	text := c.nar[x[0].Offset:][:x[0].Size]
	name := strings.TrimSuffix(c.rec.Path.Name(), nixproto.DerivationSuffix)
	drv, err := nixproto.ParseDerivation(name, text)
	if err != nil {
		return fmt.Errorf("%w derivation: %w", ErrInvalid, err)
	}
	if !slices.Equal(drv.References(), c.rec.References) {
		return fmt.Errorf("%w derivation: its references are not its inputs", ErrInvalid)
	}
	ca := nixproto.ContentAddress{Method: nixproto.CAText, Hash: nixproto.SumSHA256(text)}
	if c.rec.CA != "" && c.rec.CA != ca.String() {
		return fmt.Errorf("%w content address: claimed %s, the derivation has %s", ErrInvalid, c.rec.CA, ca)
	}
	c.rec.CA = ca.String()
	if err := nixproto.CheckCA(&c.rec.PathInfo); err != nil {
		return fmt.Errorf("%w derivation: %w", ErrInvalid, err)
	}
	c.rec.outputs = outputsOf(drv)
	return nil
}

// outputsOf returns the base names of the outputs that are known, sorted.
func outputsOf(drv *nixproto.Derivation) []string {
	var outputs []string
	for _, o := range drv.Outputs {
		if o.Path != "" {
			outputs = append(outputs, o.Path.Base())
		}
	}
	slices.Sort(outputs)
	return slices.Compact(outputs)
}
