package nixproto

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
)

// DerivationSuffix ends the names of derivation files.
const DerivationSuffix = ".drv"

// ErrInvalidDerivation is wrapped by every error about what a derivation says.
var ErrInvalidDerivation = errors.New("invalid derivation")

// A Derivation says how to build store paths: the contents of a .drv file, or,
// with no InputDrvs, the BasicDerivation of the wire.
type Derivation struct {
	// Name is the store path name of the .drv without its suffix. It is not
	// part of the ATerm or wire form; the reader sets it from the path.
	Name    string
	Outputs map[string]DerivationOutput // by output name
	// InputDrvs are the derivations this one depends on, and which of their
	// outputs, sorted; nil in a BasicDerivation.
	InputDrvs map[StorePath][]string
	InputSrcs []StorePath // sorted bytewise
	System    string
	Builder   string
	Args      []string
	// Env holds the environment with the attributes as Nix writes them,
	// "__json" included.
	Env map[string]string
}

// DerivationOutput is one output as in the ATerm and on the wire. The cases,
// by (Path, HashAlgo, Hash): input addressed (p, "", ""); fixed (p, "sha256"
// or "r:sha256" …, hex); floating ("", "r:sha256", ""); deferred ("", "", "");
// impure ("", "r:sha256", "impure").
type DerivationOutput struct {
	Path     StorePath
	HashAlgo string // with method prefix "r:", "git:" or "text:"
	Hash     string
}

// A DerivationKind says how the paths of a derivation's outputs come about.
type DerivationKind uint8

// The kinds; the zero DerivationKind is none of them.
const (
	// InputAddressed: from the derivation, before it is built.
	InputAddressed DerivationKind = iota + 1
	// FixedOutput: from a hash of its one output that the derivation states.
	FixedOutput
	// Floating: from the contents of the outputs, after the build.
	Floating
	// Deferred: from the derivation, once the floating outputs that it depends
	// on are known.
	Deferred
	// Impure: from the contents, and every build may make others.
	Impure
)

// String returns the kind for messages.
func (k DerivationKind) String() string {
	names := [...]string{"unknown", "input-addressed", "fixed-output", "floating", "deferred", "impure"}
	if int(k) >= len(names) {
		k = 0
	}
	return names[k]
}

const impureHash = "impure"

// kind returns which of the cases an output is, and checks its fields.
func (o DerivationOutput) kind() (DerivationKind, error) {
	switch {
	case o.HashAlgo == "" && o.Hash != "":
		return 0, errors.New("hash without algorithm")
	case o.HashAlgo == "" && o.Path == "":
		return Deferred, nil
	case o.HashAlgo == "":
		return InputAddressed, nil
	}
	if _, _, err := parseOutputMethod(o.HashAlgo); err != nil {
		return 0, err
	}
	if o.Hash != "" && o.Hash != impureHash {
		if o.Path == "" {
			return 0, errors.New("fixed output without path")
		}
		_, err := o.ContentAddress()
		return FixedOutput, err
	}
	if o.Path != "" {
		return 0, errors.New("path of an output that is known only after the build")
	}
	if o.Hash == impureHash {
		return Impure, nil
	}
	return Floating, nil
}

// Method returns what the content address of a fixed, floating or impure output
// is the hash of, and its algorithm.
func (o DerivationOutput) Method() (CAMethod, HashAlgo, error) {
	return parseOutputMethod(o.HashAlgo)
}

// ContentAddress returns the content address that a fixed output states.
func (o DerivationOutput) ContentAddress() (ContentAddress, error) {
	m, a, err := parseOutputMethod(o.HashAlgo)
	if err != nil {
		return ContentAddress{}, err
	}
	h, err := ParseHash(a, o.Hash)
	if err != nil {
		return ContentAddress{}, err
	}
	if h.Base16() != o.Hash {
		return ContentAddress{}, fmt.Errorf("hash %q is not hexadecimal", clip(o.Hash))
	}
	return ContentAddress{m, h}, nil
}

// Kind returns the kind that all outputs have. A mixture of kinds is an error
// that wraps ErrInvalidDerivation, and so are no outputs, a fixed output beside
// others or with another name than "out", and floating outputs with different
// algorithms.
func (d *Derivation) Kind() (DerivationKind, error) {
	var kind DerivationKind
	var floating HashAlgo
	for _, name := range d.OutputNames() {
		k, err := d.Outputs[name].kind()
		if err != nil {
			return 0, d.invalid("output %q: %w", clip(name), err)
		}
		if kind != 0 && k != kind {
			return 0, d.invalid("%v and %v outputs", kind, k)
		}
		kind = k
		if k == Floating {
			_, a, err := d.Outputs[name].Method()
			if err != nil || (floating != 0 && a != floating) {
				return 0, d.invalid("floating outputs with different hash algorithms")
			}
			floating = a
		}
	}
	if kind == 0 {
		return 0, d.invalid("no outputs")
	}
	if _, out := d.Outputs["out"]; kind == FixedOutput && (len(d.Outputs) != 1 || !out) {
		return 0, d.invalid(`a fixed-output derivation has one output, "out"`)
	}
	return kind, nil
}

// invalid returns an error that wraps ErrInvalidDerivation.
func (d *Derivation) invalid(format string, args ...any) error {
	return fmt.Errorf("%w %q: %w", ErrInvalidDerivation, clip(d.Name), fmt.Errorf(format, args...))
}

// OutputNames returns the names of the outputs, sorted.
func (d *Derivation) OutputNames() []string { return slices.Sorted(maps.Keys(d.Outputs)) }

// References returns the input derivations and sources, sorted: the references
// that the .drv file has.
func (d *Derivation) References() []StorePath {
	refs := slices.AppendSeq(slices.Clone(d.InputSrcs), maps.Keys(d.InputDrvs))
	slices.Sort(refs)
	return slices.Compact(refs)
}

// DrvPath returns the store path that the .drv file has.
func (d *Derivation) DrvPath() (StorePath, error) {
	return MakeTextPath(d.Name+DerivationSuffix, SumSHA256(d.ATerm()), d.References())
}

// OutputPathName returns the name in the store path of an output: that of the
// derivation, and the output's after a dash unless it is "out".
func OutputPathName(drvName, output string) string {
	if output == "out" {
		return drvName
	}
	return drvName + "-" + output
}

// Placeholder returns what stands for the path of an output in the derivation
// that makes it, as long as the path is not known (Nix's hashPlaceholder).
func Placeholder(output string) string {
	sum := sha256.Sum256([]byte("nix-output:" + output))
	return "/" + EncodeNix32(sum[:])
}

// UpstreamPlaceholder returns what stands for the path of an output of another,
// floating or deferred derivation (Nix's DownstreamPlaceholder).
func UpstreamPlaceholder(drv StorePath, output string) string {
	name := OutputPathName(strings.TrimSuffix(drv.Name(), DerivationSuffix), output)
	sum := sha256.Sum256([]byte("nix-upstream-output:" + drv.HashPart() + ":" + name))
	return "/" + EncodeNix32(sum[:])
}

// ScratchPath returns where a builder puts an output whose path is not known
// before the build. It is the path that Nix uses (makeFallbackPath), so that
// what a builder sees is the same.
func ScratchPath(drv StorePath, output string) (StorePath, error) {
	name := OutputPathName(strings.TrimSuffix(drv.Name(), DerivationSuffix), output)
	return makeStorePath("rewrite:"+drv.Base()+":name:"+output, Hash{algo: SHA256}, name)
}
