package nixproto

// A Derivation says how to build store paths: the contents of a .drv file, or,
// with no InputDrvs, the BasicDerivation of the wire.
type Derivation struct {
	// Name is the store path name of the .drv without its suffix. It is not
	// part of the ATerm or wire form; the reader sets it from the path.
	Name    string
	Outputs map[string]DerivationOutput // by output name
	// InputDrvs are the derivations this one depends on, and which of their
	// outputs; nil in a BasicDerivation.
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
