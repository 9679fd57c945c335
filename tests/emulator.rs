use mindskip as _;
