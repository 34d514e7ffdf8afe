package nixproto

// A BuildStatus is Nix's status number of a finished build request.
type BuildStatus uint64

// The numbers are Nix's own (libstore BuildResult::Status).
const (
	Built BuildStatus = iota
	Substituted
	AlreadyValid
	PermanentFailure
	InputRejected
	OutputRejected
	TransientFailure
	CachedFailure
	TimedOut
	MiscFailure
	DependencyFailed
	LogLimitExceeded
	NotDeterministic
	ResolvesToAlreadyValid
	NoSubstituters
)

// Success reports whether the outputs are valid.
func (s BuildStatus) Success() bool {
	return s == Built || s == Substituted || s == AlreadyValid || s == ResolvesToAlreadyValid
}

// BuildResult answers one build request.
type BuildResult struct {
	Status     BuildStatus
	Error      string // empty on success
	TimesBuilt uint64
	// NonDeterministic is never set by nbd itself.
	NonDeterministic    bool
	StartTime, StopTime int64  // Unix seconds, 0 if it did not run
	CPUUser, CPUSystem  *int64 // microseconds, nil if unknown
	// Outputs are the valid outputs by name.
	Outputs map[string]Realisation
}

// A Realisation says which path an output of a derivation became.
type Realisation struct {
	// DrvHash is the hash modulo of the derivation (the key of realisations up
	// to Nix 2.34).
	DrvHash    Hash
	OutputName string
	OutPath    StorePath
	Signatures []string
	// Dependent maps realisation ids ("sha256:<hex>!<output>") to the base
	// names of their outputs; Nix 2.8 and 2.26 fill it for content-addressed
	// derivations.
	Dependent map[string]string
}
