package vm

import (
	"fmt"
	"slices"
	"strings"

	"nbd/nixproto"
)

// structuredAttrsVar is the variable that holds all attributes as JSON.
const structuredAttrsVar = "__json"

// parseBuildOptions reads the attributes of a derivation that its builder's
// surroundings depend on. Errors are *SpecError.
func parseBuildOptions(drv *nixproto.Derivation) (*buildOptions, error) {
	a := attributes{env: drv.Env}
	if text, ok := drv.Env[structuredAttrsVar]; ok {
		object, err := parseStructuredAttrs(text)
		if err != nil {
			return nil, specErrorf("cannot process __json attribute: %v", err)
		}
		a.structured = object
	}
	o := &buildOptions{structured: a.structured}
	o.noChroot = a.flag("__noChroot")
	o.impureHost = a.set("__impureHostDeps")
	o.impureEnvVars = a.set("impureEnvVars")
	o.kvm = slices.Contains(a.set("requiredSystemFeatures"), "kvm")
	if a.structured != nil {
		o.graphs = a.structuredGraphs()
	} else {
		o.passAsFile = a.set("passAsFile")
		o.graphs = a.plainGraphs()
	}
	if a.err != nil {
		return nil, specErrorf("%v", a.err)
	}
	return o, nil
}

// attributes reads single attributes in either form. The first error stays.
type attributes struct {
	env        map[string]string
	structured map[string]any // nil: the attributes are in env
	err        error
}

func (a *attributes) fail(format string, args ...any) {
	if a.err == nil {
		a.err = fmt.Errorf(format, args...)
	}
}

// flag returns a boolean, false if it is not there.
func (a *attributes) flag(name string) bool {
	if a.structured == nil {
		return a.env[name] == "1"
	}
	v, there := a.structured[name]
	b, ok := v.(bool)
	if there && !ok {
		a.fail("attribute '%s' is not a boolean", name)
	}
	return b
}

// set returns a set of strings, sorted.
func (a *attributes) set(name string) []string {
	var list []string
	if a.structured == nil {
		list = nixFields(a.env[name])
	} else if v, there := a.structured[name]; there {
		items, ok := v.([]any)
		if !ok {
			a.fail("attribute '%s' is not a list", name)
		}
		for _, item := range items {
			s, ok := item.(string)
			if !ok {
				a.fail("attribute '%s' is not a list of strings", name)
			}
			list = append(list, s)
		}
	}
	slices.Sort(list)
	return slices.Compact(list)
}

// nixFields splits at what Nix takes for white space.
func nixFields(s string) []string {
	return strings.FieldsFunc(s, func(r rune) bool { return strings.ContainsRune(" \t\n\r", r) })
}

// plainGraphs reads "FILE PATH FILE PATH …".
func (a *attributes) plainGraphs() []graphRequest {
	text := a.env["exportReferencesGraph"]
	words := nixFields(text)
	if len(words)%2 != 0 {
		a.fail("odd number of tokens in 'exportReferencesGraph': '%s'", text)
		return nil
	}
	var graphs []graphRequest
	for pair := range slices.Chunk(words, 2) {
		if !isGraphFile(pair[0]) {
			a.fail("invalid file name '%s' in 'exportReferencesGraph'", pair[0])
		}
		graphs = append(graphs, graphRequest{pair[0], []nixproto.StorePath{a.storeObject(pair[1])}})
	}
	return sortedGraphs(graphs)
}

// structuredGraphs reads {"attribute": path or nested lists of paths, …}.
func (a *attributes) structuredGraphs() []graphRequest {
	// Nix warns of anything else here, and goes on.
	object, ok := a.structured["exportReferencesGraph"].(map[string]any)
	if !ok {
		return nil
	}
	var graphs []graphRequest
	for name, value := range object {
		g := graphRequest{name: name}
		for todo := []any{value}; len(todo) > 0; {
			v := todo[len(todo)-1]
			todo = todo[:len(todo)-1]
			switch v := v.(type) {
			case []any:
				todo = append(todo, v...)
			case string:
				g.paths = append(g.paths, a.storeObject(v))
			default:
				a.fail("'exportReferencesGraph' value is not an array or a string")
			}
		}
		graphs = append(graphs, g)
	}
	return sortedGraphs(graphs)
}

// storeObject returns the store object that a path is or lies in.
func (a *attributes) storeObject(s string) nixproto.StorePath {
	object := s
	if below, ok := strings.CutPrefix(s, nixproto.StoreDir+"/"); ok {
		base, _, _ := strings.Cut(below, "/")
		object = nixproto.StoreDir + "/" + base
	}
	p, err := nixproto.ParseStorePath(object)
	if err != nil {
		a.fail("'exportReferencesGraph': %w", err)
	}
	return p
}

// isGraphFile reports whether Nix takes s as the name of a graph's file:
// [A-Za-z_][A-Za-z0-9_.-]*.
func isGraphFile(s string) bool {
	for i := range len(s) {
		if !isShellNameByte(s[i], i == 0) && (i == 0 || s[i] != '.' && s[i] != '-') {
			return false
		}
	}
	return s != ""
}

// isShellName reports whether s can name a variable of a shell.
func isShellName(s string) bool {
	for i := range len(s) {
		if !isShellNameByte(s[i], i == 0) {
			return false
		}
	}
	return s != ""
}

func isShellNameByte(c byte, first bool) bool {
	return c == '_' || c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || !first && c >= '0' && c <= '9'
}
