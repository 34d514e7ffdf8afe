package server

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"

	"nbd/nixproto"
)

// checkDerivation refuses, in one sentence, a derivation that is not built here.
// It does not look at its inputs. Its other errors are ctx's.
func (b *Builds) checkDerivation(ctx context.Context, path nixproto.StorePath, drv *nixproto.Derivation) error {
	if err := checkShape(path, drv); err != nil {
		return refusef("cannot build '%s': %v", path, err)
	}
	return b.checkOffered(ctx, path, drv)
}

// checkOffered refuses, in one sentence, a derivation that asks for what is not
// to be had here. Its other errors are ctx's.
func (b *Builds) checkOffered(ctx context.Context, path nixproto.StorePath, drv *nixproto.Derivation) error {
	builtin := strings.HasPrefix(drv.Builder, "builtin:")
	if drv.System != "builtin" && !b.cfg.Runner.Offers(drv.System) {
		o := b.offered()
		return refusef("cannot build '%s': it is for the system '%s', %s",
			path, drv.System, o.lack(drv.System, "and this server builds for %s", o.systems))
	}
	if drv.System == "builtin" && !builtin {
		return refusef("cannot build '%s': the system 'builtin' is for builtin builders only", path)
	}
	attrs, err := attrsOf(drv)
	if err != nil {
		return refusef("cannot build '%s': %v", path, err)
	}
	required, err := attrs.strings("requiredSystemFeatures")
	if err != nil {
		return refusef("cannot build '%s': %v", path, err)
	}
	for _, f := range required {
		if slices.Contains(ownFeatures, f) {
			continue
		}
		o, err := b.offeredTo(ctx, f)
		if err != nil {
			return err
		}
		if !slices.Contains(o.features, f) {
			return refusef("cannot build '%s': it requires the system feature '%s', %s",
				path, f, o.lack(f, "and this server offers %s", o.features))
		}
	}
	if attrs.bool("__noChroot") {
		return refusef("cannot build '%s': it has __noChroot set, and every build of this server runs in the sandbox", path)
	}
	if deps, err := attrs.strings("__impureHostDeps"); err != nil || len(deps) > 0 {
		return refusef("cannot build '%s': it has __impureHostDeps, and no build sees files of this server", path)
	}
	return nil
}

// checkShape says what is wrong with a derivation in itself.
func checkShape(path nixproto.StorePath, drv *nixproto.Derivation) error {
	if !path.IsDerivation() {
		return errors.New("the path is not that of a derivation")
	}
	kind, err := drv.Kind()
	if err != nil {
		return err
	}
	if kind == nixproto.Impure || kind == nixproto.Deferred {
		return fmt.Errorf("its outputs are %v, which this server does not build", kind)
	}
	if drv.Builder == "" {
		return errors.New("it has no builder")
	}
	paths := make(map[nixproto.StorePath]bool)
	for _, name := range drv.OutputNames() {
		out := drv.Outputs[name]
		if err := checkOutputShape(kind, drv, name); err != nil {
			return fmt.Errorf("output '%s': %w", name, err)
		}
		if out.Path == "" {
			continue
		}
		if paths[out.Path] {
			return fmt.Errorf("output '%s' has the path of another output", name)
		}
		paths[out.Path] = true
	}
	for _, in := range drv.InputSrcs {
		if paths[in] {
			return fmt.Errorf("its input '%s' is one of its outputs", in)
		}
	}
	return nil
}

// checkOutputShape says what is wrong with one output of a derivation.
func checkOutputShape(kind nixproto.DerivationKind, drv *nixproto.Derivation, name string) error {
	out, pathName := drv.Outputs[name], nixproto.OutputPathName(drv.Name, name)
	if err := nixproto.CheckName(pathName); err != nil {
		return err
	}
	if kind == nixproto.InputAddressed {
		if out.Path.Name() != pathName {
			return fmt.Errorf("its path '%s' should have the name '%s'", out.Path, pathName)
		}
		return nil
	}
	method, _, err := out.Method()
	if err != nil {
		return err
	}
	if method == nixproto.CAGit {
		return errors.New("hashing outputs as Git objects is not served")
	}
	if kind != nixproto.FixedOutput {
		return nil
	}
	ca, err := out.ContentAddress()
	if err != nil {
		return err
	}
	path, err := ca.Path(pathName, nil, false)
	if err != nil {
		return err
	}
	if path != out.Path {
		return fmt.Errorf("its path should be '%s' and not '%s'", path, out.Path)
	}
	return nil
}

// drvAttrs are the attributes of a derivation that speak to the builder of it:
// variables of its environment, or members of its structured attributes.
type drvAttrs struct {
	env        map[string]string
	structured map[string]json.RawMessage // nil without structured attributes
}

func attrsOf(drv *nixproto.Derivation) (drvAttrs, error) {
	text, ok := drv.Env["__json"]
	if !ok {
		return drvAttrs{env: drv.Env}, nil
	}
	a := drvAttrs{env: drv.Env, structured: map[string]json.RawMessage{}}
	if err := json.Unmarshal([]byte(text), &a.structured); err != nil {
		return a, errors.New("its structured attributes are not a JSON object")
	}
	return a, nil
}

// strings returns an attribute that is a list of words.
func (a drvAttrs) strings(name string) ([]string, error) {
	if a.structured == nil {
		return strings.Fields(a.env[name]), nil
	}
	raw, ok := a.structured[name]
	if !ok {
		return nil, nil
	}
	var list []string
	if err := json.Unmarshal(raw, &list); err != nil {
		return nil, fmt.Errorf("its attribute %s is not a list of strings", name)
	}
	return list, nil
}

// bool returns an attribute that is true or false; false if it is not set.
func (a drvAttrs) bool(name string) bool {
	if a.structured == nil {
		return a.env[name] == "1"
	}
	return string(a.structured[name]) == "true"
}

// object returns an attribute of the structured ones that is an object; nil if
// it is not set.
func (a drvAttrs) object(name string) (map[string]json.RawMessage, error) {
	raw, ok := a.structured[name]
	if !ok {
		return nil, nil
	}
	var members map[string]json.RawMessage
	if err := json.Unmarshal(raw, &members); err != nil {
		return nil, fmt.Errorf("its attribute %s is not an object", name)
	}
	return members, nil
}

// listed puts words into a sentence.
func listed(words []string) string {
	if len(words) == 0 {
		return "none"
	}
	return strings.Join(slices.Sorted(slices.Values(words)), ", ")
}
