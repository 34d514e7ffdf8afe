package vm

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"

	"nbd/nixproto"
	"nbd/nixproto/nar"
)

// A referenceGraph answers exportReferencesGraph from what is known of a
// build's inputs.
type referenceGraph struct {
	inputs     []nixproto.PathInfo
	derivation derivationLookup
	byPath     map[nixproto.StorePath]*nixproto.PathInfo // made on first use
}

func (g *referenceGraph) info(p nixproto.StorePath) *nixproto.PathInfo {
	if g.byPath == nil {
		g.byPath = make(map[nixproto.StorePath]*nixproto.PathInfo, len(g.inputs))
		for i := range g.inputs {
			g.byPath[g.inputs[i].Path] = &g.inputs[i]
		}
	}
	return g.byPath[p]
}

// export returns the closure of paths, and of the outputs of each derivation in
// it, sorted.
func (g *referenceGraph) export(paths []nixproto.StorePath) ([]nixproto.StorePath, error) {
	for _, p := range paths {
		if g.info(p) == nil {
			return nil, specErrorf("cannot export references of path '%s' because it is not in the input closure of the derivation", p)
		}
	}
	closure := map[nixproto.StorePath]bool{}
	if err := g.addClosure(closure, paths...); err != nil {
		return nil, err
	}
	for _, p := range slices.Collect(maps.Keys(closure)) {
		if !p.IsDerivation() {
			continue
		}
		drv, err := g.derivation(p)
		if err != nil {
			return nil, fmt.Errorf("export references: %w", err)
		}
		for _, name := range drv.OutputNames() {
			out := drv.Outputs[name].Path
			if out == "" {
				return nil, specErrorf("cannot export references of the content-addressed derivation '%s'", p)
			}
			if err := g.addClosure(closure, out); err != nil {
				return nil, err
			}
		}
	}
	return slices.Sorted(maps.Keys(closure)), nil
}

// addClosure adds paths and all that they refer to.
func (g *referenceGraph) addClosure(closure map[nixproto.StorePath]bool, paths ...nixproto.StorePath) error {
	for todo := slices.Clone(paths); len(todo) > 0; {
		p := todo[len(todo)-1]
		todo = todo[:len(todo)-1]
		if closure[p] {
			continue
		}
		info := g.info(p)
		if info == nil {
			return specErrorf("cannot export references of path '%s' because it is not in the input closure of the derivation", p)
		}
		closure[p] = true
		todo = append(todo, info.References...)
	}
	return nil
}

// registration writes paths as `nix-store --load-db` and --register-validity
// without hashes read them: path, deriver (always empty), number of references,
// references.
func (g *referenceGraph) registration(paths []nixproto.StorePath) []byte {
	var b bytes.Buffer
	for _, p := range paths {
		refs := slices.Sorted(slices.Values(g.info(p).References))
		fmt.Fprintf(&b, "%s\n\n%d\n", p, len(refs))
		for _, r := range refs {
			fmt.Fprintln(&b, r)
		}
	}
	return b.Bytes()
}

// attribute returns paths in the form that structured attributes have.
func (g *referenceGraph) attribute(paths []nixproto.StorePath) ([]any, error) {
	list := []any{}
	for _, p := range paths {
		info := g.info(p)
		closure := map[nixproto.StorePath]bool{}
		if err := g.addClosure(closure, p); err != nil {
			return nil, err
		}
		var size uint64
		for q := range closure {
			size += g.info(q).NarSize
		}
		refs := []any{}
		for _, r := range slices.Sorted(slices.Values(info.References)) {
			refs = append(refs, string(r))
		}
		item := map[string]any{
			"path":        string(p),
			"valid":       true,
			"narHash":     info.NarHash.String(),
			"narSize":     jsonNumber(info.NarSize),
			"closureSize": jsonNumber(size),
			"references":  refs,
		}
		if info.CA != "" {
			item["ca"] = info.CA
		}
		list = append(list, item)
	}
	return list, nil
}

func jsonNumber(n uint64) json.Number { return json.Number(strconv.FormatUint(n, 10)) }

// maxDerivation bounds the bytes of a derivation that is read from an input.
const maxDerivation = 64 << 20

// derivationsIn returns a lookup of the derivations among inputs.
func derivationsIn(ctx context.Context, blobs Blobs, inputs []nixproto.PathInfo) derivationLookup {
	return func(p nixproto.StorePath) (*nixproto.Derivation, error) {
		i, ok := slices.BinarySearchFunc(inputs, p, func(in nixproto.PathInfo, p nixproto.StorePath) int { return cmp.Compare(in.Path, p) })
		if !ok {
			i = slices.IndexFunc(inputs, func(in nixproto.PathInfo) bool { return in.Path == p })
		}
		if i < 0 {
			return nil, fmt.Errorf("%s is not an input", p)
		}
		text, err := readFlat(ctx, blobs, inputs[i].NarHash)
		if err != nil {
			return nil, fmt.Errorf("read %s: %w", p, err)
		}
		drv, err := nixproto.ParseDerivation(strings.TrimSuffix(p.Name(), nixproto.DerivationSuffix), text)
		if err != nil {
			return nil, specErrorf("%v", err)
		}
		return drv, nil
	}
}

// readFlat returns the contents of a store object that is one file.
func readFlat(ctx context.Context, blobs Blobs, narHash nixproto.Hash) (_ []byte, err error) {
	b, err := blobs.Open(ctx, narHash)
	if err != nil {
		return nil, err
	}
	defer func() { err = cmp.Or(err, b.Close()) }()
	index, err := b.Index()
	if err != nil {
		return nil, err
	}
	if len(index) != 1 || index[0].Kind != nar.Regular || index[0].Size > maxDerivation {
		return nil, fmt.Errorf("it is not a file of at most %d bytes", maxDerivation)
	}
	text := make([]byte, index[0].Size)
	if _, err := b.ReadAt(text, index[0].Offset); err != nil {
		return nil, err
	}
	return text, nil
}
